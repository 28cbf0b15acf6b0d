"""Labs as a browser sees them, on the real runtime: opened by a link, drawn until nothing is under way, read."""

import time
from pathlib import Path

from streamlit.testing.v1 import AppTest

APP = Path(__file__).parents[2] / "app.py"
SECONDS = 120


def opened(lab, query, state=None):
    """The page of `lab`, an entry of `ui.labs`, as a link with these settings opens it, once it is finished."""
    app = AppTest.from_file(str(APP), default_timeout=SECONDS)
    app.run()
    app.switch_page(lab.script)
    for name, value in (state or {}).items():
        app.session_state[name] = value
    app.query_params.update({f"{lab.url_path}_{name}": str(value) for name, value in query.items()})
    return finished(app)


def finished(app):
    """Draw the page until nothing is under way, as its polling fragment does in a browser."""
    end = time.monotonic() + SECONDS
    app.run()
    while app.progress or app.get("skeleton"):
        assert time.monotonic() < end, "the page never got there"
        time.sleep(0.1)
        app.run()
    assert not app.exception
    return app


def words(app):
    """Everything the page says, without Markdown's escapes."""
    boxes = (app.error, app.warning, app.info, app.success)
    kinds = (app.caption, app.markdown, app.header, app.subheader, app.text, *boxes)
    said = [element.value for kind in kinds for element in kind] + [expander.label for expander in app.expander]
    return "\n".join(said).replace("\\", "").replace("\u2060", "").replace("\u00a0", " ")
