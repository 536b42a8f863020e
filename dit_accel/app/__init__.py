"""The page in the browser: generate and compare, look at masks, guide, enlarge, evaluate.

`settings.py` bounds what may be asked, `jobs.py` runs one request at a time, `work.py` does it,
`store.py` keeps the results, `views.py` and ``templates/`` show them; ``tabs/`` are what one sees,
`server.py` decides what a browser may ask for. Only `options.py`, `site.py`, ``tabs/``, `page.py`
and `server.py` import gradio.
"""

from __future__ import annotations

from collections.abc import Callable

from dit_accel.app.settings import AppSettings
from dit_accel.errors import OptionError

__all__ = ["AppSettings", "serve"]


def serve(settings: AppSettings, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve the page until it is interrupted.

    Args:
        settings: where, and how much may be asked of it.
        ready: told the page's address.

    Raises:
        OptionError: if gradio is not installed, or the address or the folder can't be used.
    """
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise OptionError(
            "the page needs gradio, which is not installed: pip install 'dit-accel[app]'"
        ) from error
    from dit_accel.app.server import serving

    with serving(settings) as (server, address):
        ready(address)
        server.run()
