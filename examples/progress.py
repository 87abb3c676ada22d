"""The progress bar of the examples that train for long."""


def progress_bar(disable=False, period=300):
    """Return a progress bar on stderr, with the time left as told by the last `period` seconds; not yet started."""
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left:"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=disable,
        speed_estimate_period=period,
    )
