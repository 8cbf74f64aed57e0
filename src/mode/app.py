"""`mode app`: a small web page on which one tries the ensemble."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode import door
from mode.ensemble.images import OneImage
from mode.ensemble.model import Ensemble
from mode.ensemble.request import MAX_BYTES, MAX_REQUEST, count_pixels
from mode.errors import ModeError

if TYPE_CHECKING:
    from gradio import Blocks
    from starlette.types import ASGIApp

TITLE = "Mixture of Data Experts"
HELP = (
    "Drop an image and type the classes it might be, one a line. The words of the classes alone decide how much each"
    " expert counts; the ensemble's answer is the sum of their opinions by that weight."
)
#: Classes, and characters of one, that the page takes.
MAX_CLASSES, MAX_LENGTH = 1_000, 200
#: Every so many seconds, uploads of so many seconds ago are removed.
FORGET = (60, 1800)


def serve(ensemble: Ensemble, port: int = 7860) -> None:
    """Show the page on this machine until Ctrl-C; port 0 is any that is free. What was uploaded goes with it.

    Raises:
        ModeError: the port is in use.
    """
    with tempfile.TemporaryDirectory(prefix="mode-app-", ignore_cleanup_errors=True) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        door.serve(application(build(ensemble)), port, _announce, MAX_REQUEST)


def _announce(address: str) -> None:
    print(f"open {address}    (Ctrl-C stops it)", flush=True)


def application(page: Blocks) -> ASGIApp:
    """A page as an ASGI application, which refuses larger files than can be asked about."""
    from fastapi import FastAPI
    from gradio import mount_gradio_app

    options = {"path": "/", "max_file_size": MAX_BYTES, "show_error": False, "run_history": False}
    return mount_gradio_app(FastAPI(openapi_url=None), page, **options)  # type: ignore[no-any-return]


def build(ensemble: Ensemble) -> Blocks:
    """The page for an ensemble, not served."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=FORGET) as page:
        gr.Markdown(f"# {TITLE}\n{HELP}")
        with gr.Row():
            with gr.Column():
                # As it was uploaded: it is decoded where all images are, after a look at its size.
                image = gr.Image(type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"])
                classes = gr.Textbox(
                    label="Classes, one a line", lines=5, placeholder="white chess king\nace of hearts"
                )
                templates = gr.Textbox(label="Prompts, one a line; {c} is the class", lines=2, value="{c}")
                ask = gr.Button("Ask the ensemble", variant="primary")
            with gr.Column():
                answer = gr.Label(label="The ensemble's answer", num_top_classes=5)
                opinions = gr.Dataframe(
                    headers=["expert", "weight", "its answer", "how sure, %"],
                    label="Each expert's opinion",
                    interactive=False,
                )
        given = [image, classes, templates]
        ask.click(partial(_answer, ensemble), given, [answer, opinions], api_name="ask")
    return page  # type: ignore[no-any-return]


def ask_ensemble(
    ensemble: Ensemble, image: OneImage, classes: list[str], templates: list[str]
) -> tuple[dict[str, float], list[list[Any]]]:
    """The ensemble's probabilities by class, and a row for each expert: name, weight, its answer, how sure in percent.

    An expert that is not trained yet has the seed's opinion, and is marked so.
    """
    task = ensemble.adapt(classes, templates)
    probabilities = dict(zip(task.classes, task(image)[0].tolist(), strict=True))
    opinions = task.opinions(image)
    rows = []
    for expert, weight in task.weights.items():
        member = ensemble.members[expert]
        if member not in opinions:  # of weight 0: not asked
            rows.append([expert, round(weight, 3), "–", "–"])
            continue
        sure, column = opinions[member][0].max(dim=0)
        name = expert if member == expert else f"{expert} ({member})"
        rows.append([name, round(weight, 3), task.classes[int(column)], round(100 * float(sure), 1)])
    return probabilities, rows


def _answer(ensemble: Ensemble, image: str | None, classes: str, templates: str) -> tuple[dict[str, float], list[Any]]:
    from gradio import Error

    names = list(dict.fromkeys(line.strip() for line in classes.splitlines() if line.strip()))
    prompts = [line.strip() for line in templates.splitlines() if line.strip()]
    if image is None:
        raise Error("There is no image yet.")
    if len(names) > MAX_CLASSES or any(len(name) > MAX_LENGTH for name in [*names, *prompts]):
        raise Error(f"At most {MAX_CLASSES} classes of {MAX_LENGTH} characters.")
    try:
        content = Path(image).read_bytes()
        count_pixels(content)
        return ask_ensemble(ensemble, content, names, prompts)
    except OSError:
        raise Error("The image is no longer there: drop it once more.") from None
    except ValueError as error:
        raise Error(f"The image: {error}.") from None
    except ModeError as error:
        raise Error(str(error)) from None
