"""The file of a labelling: events are appended, and each is on the disk before it is acknowledged.
It knows no HTTP.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from gearshift.data.labels import FILE, Event, Item, Labels, read_events
from gearshift.errors import FolderInUseError
from gearshift.runtime.files import sync, writing
from gearshift.runtime.folder_lock import holder_of, lock_run_folder
from gearshift.runtime.terminal import counted, echo


class LabelStore:
    """The only writer of a folder's labels, and what they add up to.

    Threads may call it. Raises `FolderInUseError` if another process labels in this folder,
    `StorageError` if the file cannot be written, and `DataError` if it is broken.
    """

    def __init__(self, folder: Path, app: str) -> None:
        """`app`: the name and version of the program, which each event keeps."""
        self.file, self._app = folder / FILE, app
        self._lock, self._open = threading.RLock(), ExitStack()
        try:
            self._open.enter_context(lock_run_folder(folder))
        except FolderInUseError:
            who = holder_of(folder) or "another process"
            raise FolderInUseError(f"{folder} is labelled by {who}; stop it first.") from None
        with self._open:
            with writing(self.file):
                handle = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
                self._open.callback(os.close, handle)
                sync(folder)
            events, self._size = read_events(self.file)
            torn = os.fstat(handle).st_size - self._size
            if torn:
                with writing(self.file):
                    os.ftruncate(handle, self._size)
                    os.fsync(handle)
                what = f"a last line of {counted(torn, 'byte')}, which was never acknowledged"
                echo(f"labels: {self.file} ended with {what}; it is taken out.")
            self.labels, self._handle = Labels(events), handle
            self._open = self._open.pop_all()

    def add(self, event: Event) -> bool:
        """Write an event, and take it in once it is on the disk. An event whose id is known is not
        written again, and returns False: a page that got no answer sends its labels once more.
        """
        event = {"id": event["id"], "t": round(time.time(), 3), **event, "app": self._app}
        line = json.dumps(event, ensure_ascii=False) + "\n"
        data = line.encode("utf-8", errors="backslashreplace")
        with self._lock:
            if event["id"] in self.labels.events:
                return False
            try:
                with writing(self.file):
                    if os.write(self._handle, data) != len(data):
                        raise OSError(28, os.strerror(28))
                    os.fsync(self._handle)
            except BaseException:  # whoever sent the event does so again
                os.ftruncate(self._handle, self._size)
                raise
            self._size += len(data)
            return self.labels.add(event)

    def add_item(self, item: Item) -> bool:
        """Write an item; False if the same prompt with the same answers is there."""
        event: Event = {
            "id": f"item-{item.id}",
            "kind": "item",
            "item": item.id,
            "who": "",
            "prompt": item.prompt,
            "answers": item.answers,
            "options": item.options,
            "source": item.sources,
        }
        if item.gold is not None:
            event["gold"] = item.gold
        return self.add(event)

    def close(self) -> None:
        """Give the folder free."""
        with self._lock:
            self._open.close()

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
