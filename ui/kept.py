"""Widgets that are not drawn all the time keep what they hold: Streamlit forgets a widget that one drawing leaves out.

What a widget was left with comes back when it is drawn again, in the URL as well, unless a link or the page itself has
given it something else. A lab that is opened anew begins without memories: there the link alone counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from engine.experiments import ExperimentParams
from ui import controls
from ui.controls import Look


@dataclass(frozen=True)
class Kept:
    """The memory of one lab.

    Args:
        prefix: the lab's.
    """

    prefix: str

    def begin(self) -> None:
        """Call it first in every drawing: it tells whether the lab has just been opened."""
        drawn = st.session_state.get(self._drawn, ())
        if not any(key in st.session_state for key in drawn):
            st.session_state[self._values] = {}
        st.session_state[self._drawn] = ()

    def keep(self, key: str, value: Any, text: str | list[str] | None) -> None:
        """Remember what a widget holds that was just drawn.

        Args:
            key: of the widget.
            value: what it holds.
            text: the same as the URL has it; None for the default, which the URL does not have.
        """
        st.session_state[self._values][key] = (value, text)
        st.session_state[self._drawn] += (key,)

    def restore(self, key: str) -> None:
        """Give a widget that is drawn next what it held."""
        values = st.session_state[self._values]
        if key in values and key not in st.session_state and key not in st.query_params:
            st.session_state[key], text = values[key]
            if text is not None:
                st.query_params[key] = text

    def controls(
        self,
        model: type[ExperimentParams],
        *,
        prefix: str,
        fields: Sequence[str],
        notes: DeltaGenerator | None = None,
        **looks: Look,
    ) -> dict[str, Any]:
        """`ui.controls.controls`, with a memory."""
        for field in fields:
            self.restore(f"{prefix}_{field}")
        values = controls.controls(model, prefix=prefix, fields=fields, notes=notes, **looks)
        for field, value in values.items():
            look = looks.get(field, Look())
            text = str(value).lower() if isinstance(value, bool) else "" if value is None else look.name(value)
            default = model.model_fields[field].default if look.value is None else look.value
            self.keep(f"{prefix}_{field}", value, None if value == default else text)
        return values

    @property
    def _values(self) -> str:
        return f"_{self.prefix}_kept"

    @property
    def _drawn(self) -> str:
        return f"_{self.prefix}_drawn"
