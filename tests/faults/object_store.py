"""An S3 server on this machine that is away for a while, and then back with all that was in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

from s2t_models.storage import ObjectPath

from .raylets import free_port

BUCKET = "runs"


class ObjectStore:
    """Points the environment of what is started later at itself."""

    def __init__(self) -> None:
        from pyarrow.fs import S3FileSystem

        port = free_port()
        address = f"http://127.0.0.1:{port}"
        os.environ |= {"AWS_ENDPOINT_URL_S3": address, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._back = threading.Event()
        self._back.set()
        files = S3FileSystem(endpoint_override=address, allow_bucket_creation=True)
        for _ in range(60):
            with suppress(OSError):
                files.create_dir(BUCKET)
                return
            time.sleep(0.5)
        raise TimeoutError("the S3 server does not start; it comes with the extra `dev`")

    def folder(self, name: str) -> ObjectPath:
        return ObjectPath(f"s3://{BUCKET}/{name}")

    def leave(self, seconds: float) -> None:
        """Answer nothing for some seconds."""
        self._back.clear()
        self._server.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, self._return).start()

    def wait(self) -> None:
        """Until it is there."""
        self._back.wait()

    def close(self) -> None:
        self._server.kill()
        self._server.wait()

    def _return(self) -> None:
        self._server.send_signal(signal.SIGCONT)
        self._back.set()
