"""Progress bars for a terminal, built on rich."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar

ECHO = 3  # free columns: a terminal echoes ^C at the end, and a wrapped line would be drawn twice


class OutcomeBar(BarColumn):
    """A bar that is red while its task's field ``bad`` is true."""

    def render(self, task: Task) -> ProgressBar:
        bar = super().render(task)
        if task.fields["bad"]:
            bar.complete_style = bar.finished_style = "red"
        return bar


class Bars(Progress):
    """One bar for shards and one for images, each with a count, a note and the elapsed time."""

    def __init__(self, stream: TextIO, shards: int, images: int) -> None:
        console = Console(file=stream)
        self._bar_width = min(24, max(8, console.width // 5))
        super().__init__(
            TextColumn("{task.description:<7}"),
            OutcomeBar(self._bar_width),
            TextColumn("{task.fields[count]}", justify="right"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
        )
        self._shards = self.add_task("shards", total=shards, count="", note="", bad=False)
        self._images = self.add_task("images", total=images, count="", note="", bad=False)

    def get_renderables(self) -> Iterable[RenderableType]:
        for one in super().get_renderables():
            yield Padding(one, (0, ECHO, 0, 0), expand=False)

    def show_shards(self, done: int, note: str, bad: bool) -> None:
        self._show(self._shards, done, note, bad)

    def show_images(self, done: int, note: str, bad: bool) -> None:
        self._show(self._images, done, note, bad)

    def _show(self, task: TaskID, done: int, note: str, bad: bool) -> None:
        """Update a bar; the note is shortened if the line would be wider than the terminal."""
        counts = [f"{done:,}/{self._tasks[one].total or 0:,.0f}" for one in (task, self._images)]
        others = len("shards  " + " " * 3 + "0:00:00") + self._bar_width + max(map(len, counts))
        room = max(8, self.console.width - others - ECHO)
        note = note if len(note) <= room else f"{note[: room - 1]}…"
        self.update(task, completed=done, count=counts[0], note=note, bad=bad)
