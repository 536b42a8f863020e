"""What all tabs of the page share: bounds, results, and the line of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import gradio as gr

from dit_accel.app import views
from dit_accel.app.jobs import Job, Jobs
from dit_accel.app.settings import AppSettings
from dit_accel.app.store import Store
from dit_accel.app.work import Studio
from dit_accel.errors import DitAccelError

LOOK_EVERY_S = 0.2
MAX_GALLERY = 12


class Site:
    """One page that is being served, to all of its visitors.

    Raises:
        OptionError: if the folder of results can't be made.
    """

    def __init__(self, settings: AppSettings) -> None:
        self.settings = settings
        self.store = Store(settings.output)
        self.studio = Studio(self.store)
        self.jobs = Jobs(settings.max_waiting, self.studio.clean_up)

    async def follow(
        self, request: gr.Request, prepare: Callable[[], Callable[[Job], Any]]
    ) -> AsyncIterator[tuple[str, Any]]:
        """Put work in line and yield (what to show, its result once there is one) until it is over.

        Args:
            request: of the browser; there is one piece of work at a time for each open page.
            prepare: checks the request and returns the work; it may take a moment.
        """
        try:
            work = await asyncio.to_thread(prepare)
            job = self.jobs.submit(str(request.session_hash), work)
        except DitAccelError as error:
            yield views.refusal(str(error)), None
            return
        last = ""
        while not job.is_over:
            shown = views.progress(job, self.jobs.ahead_of(job))
            if shown != last:
                yield shown, None
                last = shown
            await asyncio.sleep(LOOK_EVERY_S)
        if job.state == "done":
            yield "", job.result
        elif job.state == "cancelled":
            yield views.cancelled(), None
        else:
            yield views.refusal(job.refusal), None

    def cancel(self, request: gr.Request) -> None:
        """Cancel what a page has in line."""
        self.jobs.cancel(str(request.session_hash))

    def kept(self, names: object) -> list[tuple[str, dict[str, Any]]]:
        """Return the results of these names that there still are; a browser can send anything."""
        listed = names[:MAX_GALLERY] if isinstance(names, list) else []
        found = [(name, self.store.result(name)) for name in listed]
        return [(name, content) for name, content in found if content is not None]


def remembered(names: object, fresh: str) -> list[str]:
    """Return a gallery's names with a fresh one in front."""
    old = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return [fresh, *old][:MAX_GALLERY]


def run_buttons(label: str, elem_id: str, variant: Any = "primary") -> tuple[Any, Any]:
    """Return the button that starts a request and the one that cancels it."""
    with gr.Row(elem_classes="da-buttons"):
        start = gr.Button(label, variant=variant, elem_id=f"{elem_id}-start", scale=3)
        stop = gr.Button("Cancel", interactive=False, elem_id=f"{elem_id}-cancel", scale=1)
    return start, stop


def connect_run(
    site: Site,
    buttons: tuple[Any, Any],
    status: Any,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    prepare: Callable[[dict[Any, Any]], Callable[[Job], Any]],
    finish: Callable[[dict[Any, Any], Any], dict[Any, Any]],
) -> None:
    """Let a pair of buttons start and cancel work.

    Args:
        site: that serves it.
        buttons: of `run_buttons`.
        status: the HTML component for progress and refusals.
        inputs: components whose values the work depends on.
        outputs: components that ``finish`` updates.
        prepare: makes the work of these values by component, or refuses.
        finish: makes the updates of these values and the work's result.
    """
    start, stop = buttons

    async def press(values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        running = {start: gr.update(interactive=False), stop: gr.update(interactive=True)}
        yield {status: views.starting(), **running}
        async for shown, result in site.follow(request, lambda: prepare(values)):
            update = {status: shown}
            if result is not None:
                update |= await asyncio.to_thread(finish, values, result)
            yield update
        yield {start: gr.update(interactive=True), stop: gr.update(interactive=False)}

    start.click(
        press,
        set(inputs),
        [status, start, stop, *outputs],
        show_progress="hidden",
        concurrency_limit=None,
        api_visibility="private",
    )
    stop.click(
        site.cancel, show_progress="hidden", concurrency_limit=None, api_visibility="private"
    )
