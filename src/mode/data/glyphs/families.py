"""The characters of the built-in data: families that people made, each a zero-shot task.

Code points are hexadecimal, `first-last` for a range. Every one is in DejaVu Sans Bold and in at least one of the fonts
that training draws with (the tests look). A family has 6 to 20, so that no task is trivial and none outweighs the rest.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import NamedTuple


class Family(NamedTuple):
    """Characters of one kind.

    Attributes:
        name: of the task's folder.
        kind: what one calls such a character, in the singular.
        code_points: in hexadecimal, separated by spaces.
    """

    name: str
    kind: str
    code_points: str

    @property
    def characters(self) -> list[str]:
        """The characters themselves, in the table's order."""
        characters = []
        for part in self.code_points.split():
            first, _, last = part.partition("-")
            characters += [chr(code) for code in range(int(first, 16), int(last or first, 16) + 1)]
        return characters

    def first(self, count: int | None) -> list[str]:
        """So many of its characters, all of them with None.

        >>> Family("dice", "die", "2680-2685").first(2)
        ['⚀', '⚁']
        """
        return self.characters[:count]


# fmt: off
FAMILIES = [
    # Games.
    Family("chess", "chess piece", "2654-265F"),
    Family("dice", "die", "2680-2685"),
    Family("dominoes", "domino", "1F031-1F044"),
    Family("card-suits", "card suit", "2660-2667"),
    Family("spades", "playing card", "1F0A1-1F0AE"),
    Family("hearts", "playing card", "1F0B1-1F0BE"),
    Family("diamonds", "playing card", "1F0C1-1F0CE"),
    Family("clubs", "playing card", "1F0D1-1F0DE"),
    # The sky.
    Family("zodiac", "zodiac sign", "2648-2653"),
    Family("planets", "astronomical symbol", "2609 263D-263F 2641 2643-2647 26B3-26B8"),
    Family("weather", "weather symbol", "2600-2604 2607 2608 2614 263C 2668 26A1 2744-2746"),
    # Alphabets.
    Family("greek-capitals", "greek letter", "391-3A1 3A3-3A5"),
    Family("greek-small", "greek letter", "3B1-3C1 3C3-3C5"),
    Family("cyrillic", "cyrillic letter", "410-423"),
    Family("armenian", "armenian letter", "531-544"),
    Family("georgian", "georgian letter", "10D0-10E3"),
    Family("hebrew", "hebrew letter", "5D0-5D9 5DB 5DC 5DE 5E0-5E2 5E4 5E6-5E8"),
    Family("arabic", "arabic letter", "627 628 62A-63A 641"),
    Family("arabic-digits", "arabic digit", "660-669"),
    Family("nko", "n'ko letter", "7CA-7DD"),
    Family("nko-digits", "n'ko digit", "7C0-7C9"),
    Family("ogham", "ogham letter", "1681-1694"),
    Family("tifinagh", "tifinagh letter", "2D30-2D43"),
    Family("lao", "lao letter", "E81 E82 E84 E87 E88 E8A E8D E94-E97 E99-E9F EA1 EA2"),
    Family("old-italic", "old italic letter", "10300-10313"),
    Family("canadian", "canadian syllable", "1401 1403 1405 140A 142F 1431 1433 1438 144C 144E 1450 1455"
           " 146B 146D 146F 1472 1489 148B 148D 1490"),
    Family("coptic", "coptic letter", "3E2-3EF"),
    # The I Ching.
    Family("hexagrams", "i ching hexagram", "4DC0-4DD3"),
    Family("trigrams", "i ching trigram", "2630-2637"),
    # Arrows.
    Family("arrows", "arrow", "2190-21A3"),
    Family("double-arrows", "arrow", "21CD-21DB"),
    Family("white-arrows", "arrow", "21E0-21F0"),
    Family("dingbat-arrows", "arrow", "2798-27AB"),
    Family("harpoons", "harpoon arrow", "21BC-21C3 21CB 21CC"),
    # Mathematics.
    Family("integrals", "integral", "222B-2233 2A0C-2A16"),
    Family("equalities", "mathematical relation", "2243-2256"),
    Family("inequalities", "mathematical relation", "2264-2277"),
    Family("sets", "set relation", "2208-220D 2282-228B 2229 222A"),
    Family("circled-operators", "mathematical operator", "2295-22A1"),
    Family("turnstiles", "logical symbol", "2200 2203 2204 2227 2228 22A2-22AF"),
    # Numbers and money.
    Family("roman-numerals", "roman numeral", "2160-216F"),
    Family("fractions", "fraction", "BC-BE 2150-215E"),
    Family("circled-digits", "circled digit", "2460-2469 2776-277F"),
    Family("currency", "currency", "20A0-20B3"),
    # Faces and hands.
    Family("smileys", "emoticon", "1F600-1F613"),
    Family("faces", "emoticon", "1F614-1F623 1F625-1F628"),
    Family("cats", "cat emoticon", "1F638-1F640"),
    Family("hands", "hand", "261A-261F 270C 270D"),
    # Signs and ornaments.
    Family("music", "music symbol", "2669-266F"),
    Family("stars", "star", "2605 2606 2726 2727 2729-2730 2734-2739"),
    Family("asterisks", "asterisk ornament", "2722-2725 2731-2733 273A-273D 2743 2749-274B 273E-2741"),
    Family("crosses", "cross", "2613 2626 2628 2629 2670 2671 2719-2720"),
    Family("beliefs", "religious symbol", "2624 2625 2627 262A-262F 2638 2721"),
    Family("recycling", "recycling symbol", "2672-267D"),
    Family("objects", "object", "260E 2692-269C 2702 2708 2709 270E 2302 2328 26B0 26B1"),
    Family("gender", "gender symbol", "2640 2642 26A2-26A9 26B2"),
    # Shapes.
    Family("squares", "geometric shape", "25A0-25A9 25E7-25EB 25F0-25F3"),
    Family("triangles", "geometric shape", "25B2 25B3 25B6 25B7 25BC 25BD 25C0 25C1 25E2-25E5 25EC-25EE"),
    Family("circles", "geometric shape", "25C9-25D5 25E0 25E1 25F4-25F7"),
]
# fmt: on


@cache
def name_of(character: str) -> str:
    """What people call a character: its Unicode name in lower case, such as `white chess king`."""
    return unicodedata.name(character).lower()
