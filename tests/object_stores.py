"""Servers of both object stores on this machine, moto's for S3 and an emulator for GCS, behind proxies with faults."""

import contextlib
import http.server
import logging
import os
import select
import socket
import threading
import time
import unittest.mock

from hosts import free_port

BUCKET = "bucket"
ANONYMOUS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
ANONYMOUS |= {"FSSPEC_GCS_TOKEN": "anon", "GOOGLE_CLOUD_PROJECT": "x"}


class Proxy:
    """Passes connections on to a server; those that `faults` are for it answers itself, or not at all."""

    def __init__(self, port: int):
        self.upstream, self.faults, self.hit, self.open = port, [], [], set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def inject(self, *faults):
        """The next connections meet these: a status, or "stall"; those that are open are closed."""
        self.faults, self.hit = list(faults), []
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def serve(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.handle, args=(connection,), daemon=True).start()

    def handle(self, connection):
        with connection, contextlib.suppress(OSError):
            if not connection.recv(1, socket.MSG_PEEK):
                return
            if self.faults:
                self.hit.append(fault := self.faults.pop(0))
                if fault == "stall":
                    time.sleep(20)
                    return
                connection.recv(2**20)
                connection.sendall(f"HTTP/1.1 {fault} Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                return
            with socket.create_connection(("127.0.0.1", self.upstream)) as server:
                self.open.add(connection)
                self.copy(connection, server)
                self.open.discard(connection)

    def copy(self, a, b):
        while True:
            for ready in select.select([a, b], [], [])[0]:
                if not (data := ready.recv(2**16)):
                    return
                (b if ready is a else a).sendall(data)


@contextlib.contextmanager
def served():
    """Both servers, each with an empty bucket: {"gs://": its proxy, "s3://": its proxy}; the environment names them."""
    import boto3
    from gcp_storage_emulator.server import create_server
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    http.server.HTTPServer.handle_error = lambda *_: None  # of a client that has given up
    gcs, s3 = free_port(), free_port()
    emulator = create_server("127.0.0.1", gcs, in_memory=True, default_bucket=BUCKET)
    emulator.start()
    ThreadedMotoServer("127.0.0.1", s3, verbose=False).start()
    proxies = {"gs://": Proxy(gcs), "s3://": Proxy(s3)}
    hosts = {"STORAGE_EMULATOR_HOST": proxies["gs://"].url, "AWS_ENDPOINT_URL": proxies["s3://"].url}
    with unittest.mock.patch.dict(os.environ, ANONYMOUS | hosts):
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        try:
            yield proxies
        finally:
            emulator.stop()  # its thread would keep the process alive
