"""`mode app`: a small web page on which one tries the ensemble."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from mode.ensemble.model import Ensemble
from mode.errors import ModeError

if TYPE_CHECKING:
    from gradio import Blocks
    from PIL.Image import Image

HOST = "127.0.0.1"
TITLE = "Mixture of Data Experts"
HELP = (
    "Drop an image and type the classes it might be, one a line. The words of the classes alone decide how much each"
    " expert counts; the ensemble's answer is the sum of their opinions by that weight."
)
#: Classes, and characters of one, that the page takes.
MAX_CLASSES, MAX_LENGTH = 1_000, 200


def serve(ensemble: Ensemble, port: int = 7860) -> None:
    """Show the page on this machine until Ctrl-C; port 0 is any that is free.

    Raises:
        ModeError: the port is in use.
    """
    page = build(ensemble)
    try:
        _, address, _ = page.launch(
            server_name=HOST, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True
        )
    except OSError as error:
        raise ModeError(f"port {port}: {error}", "choose another: --port N") from None
    print(f"open {address}    (Ctrl-C stops it)", flush=True)
    page.block_thread()


def build(ensemble: Ensemble) -> Blocks:
    """The page for an ensemble, not launched."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read on import
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n{HELP}")
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", label="Image", sources=["upload", "clipboard"])
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
    ensemble: Ensemble, image: Image, classes: list[str], templates: list[str]
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


def _answer(
    ensemble: Ensemble, image: Image | None, classes: str, templates: str
) -> tuple[dict[str, float], list[Any]]:
    from gradio import Error

    names = list(dict.fromkeys(line.strip() for line in classes.splitlines() if line.strip()))
    prompts = [line.strip() for line in templates.splitlines() if line.strip()]
    if image is None:
        raise Error("There is no image yet.")
    if len(names) > MAX_CLASSES or any(len(name) > MAX_LENGTH for name in [*names, *prompts]):
        raise Error(f"At most {MAX_CLASSES} classes of {MAX_LENGTH} characters.")
    try:
        return ask_ensemble(ensemble, image, names, prompts)
    except ModeError as error:
        raise Error(str(error)) from None
