"""The Your adapter view: an adapter from elsewhere, or the one just trained, and how many directions it uses."""

from __future__ import annotations

from typing import Any

import streamlit as st

from engine import local_models
from engine.errors import InputError
from engine.experiments import lora_adapter
from ui import run
from ui.lora import spectrum
from ui.lora.settings import PREFIX, RUN, Settings
from ui.lora.upload import MAX_MEGABYTES, WEIGHTS_FILE, IncompleteError, Upload, adapter_files
from ui.prose import plain

_ADDRESS = f"{PREFIX}_adapter"
_MATRIX = f"{PREFIX}_adapter_layer"
_PROBLEM = f"_{PREFIX}_upload_problem"
_TURN = f"_{PREFIX}_upload_turn"


def adapter(_: Settings) -> None:
    """The place to upload, and the spectrum of what is there."""
    turn = st.session_state.get(_TURN, 0)
    given = st.file_uploader(
        f"{WEIGHTS_FILE} and its adapter_config.json, or a zip of both",
        accept_multiple_files=True,
        key=f"_{PREFIX}_upload_{turn}",
        max_upload_size=MAX_MEGABYTES,
        on_change=_take,
        args=(f"_{PREFIX}_upload_{turn}",),
        help="As PEFT saves them. Only numbers are read from the files: a pickle could run code, and is never opened.",
    )
    last = run.latest(RUN)
    if last is not None and last.archive:
        st.button(
            "Open the adapter that you have just trained",
            icon=":material/move_down:",
            on_click=_take_last,
            args=(last,),
        )
    name = st.query_params.get(_ADDRESS)
    if problem := st.session_state.get(_PROBLEM):
        st.error(
            plain(problem if name is None else f"{problem} What is drawn below is still the adapter from before."),
            icon=":material/edit:",
        )
    if name is None:
        if not given:
            st.caption(
                "Any adapter in PEFT's format will do, of whichever model: its singular values say how many of its "
                "directions it really uses. The file is kept on this server's disk, until newer ones take its place, "
                "and opens for whoever has the link."
            )
        return
    folder = local_models.uploaded(name)
    if folder is None:
        st.warning(
            "The adapter of this link is not on this machine (any more): upload it again.", icon=":material/link_off:"
        )
        return
    params = lora_adapter.Params(path=str(folder))
    found = run.run("lora_adapter", params, key=f"{PREFIX}_adapter_run")
    if found is not None and run.params_of(f"{PREFIX}_adapter_run") == params:
        _draw(found, params)


def _take(key: str) -> None:
    """Keep what was uploaded under what it holds, and put that into the address.

    The place to upload is empty afterwards, so that the next file is not judged together with this one; only half of an
    adapter stays there and waits for the other.
    """
    uploads: list[Upload] = st.session_state[key] or []
    st.session_state[_PROBLEM] = None
    if not uploads:
        return
    try:
        _open(adapter_files(uploads))
    except IncompleteError as error:
        st.session_state[_PROBLEM] = str(error)
        return
    except InputError as error:
        st.session_state[_PROBLEM] = str(error)
    _empty()


def _take_last(last: Any) -> None:
    st.session_state[_PROBLEM] = None
    _empty()
    _open(adapter_files([_Archive(last.archive)]))


def _empty() -> None:
    """Put an empty place to upload where the present one is."""
    st.session_state[_TURN] = st.session_state.get(_TURN, 0) + 1


def _open(files: dict[str, bytes]) -> None:
    st.query_params[_ADDRESS] = local_models.keep_upload(files).name
    st.session_state.pop(_MATRIX, None)
    st.query_params.pop(_MATRIX, None)


class _Archive:
    """A run's archive as if it had been uploaded."""

    name = "adapter.zip"

    def __init__(self, content: bytes) -> None:
        self._content = content

    def getvalue(self) -> bytes:
        """The zip."""
        return self._content


def _draw(found: lora_adapter.Result, params: lora_adapter.Params) -> None:
    st.markdown(plain(found.sentence))
    chosen = spectrum.choose(found.layers, int(found.spectra[:, 0].argmax()), key=_MATRIX)
    note = "DoRA's magnitudes are left out." if found.dora else ""
    spectrum.draw(found, chosen, key=f"{PREFIX}_uploaded", experiment="lora_adapter", params=params, note=note)
