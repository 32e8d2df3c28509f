"""Ids that the client makes."""

from __future__ import annotations

import os
import uuid

from asyncq.client import _new_id


def test_new_ids_are_uuids_and_all_differ() -> None:
    ids = {_new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert {(uuid.UUID(i).version, uuid.UUID(i).variant) for i in ids} == {(4, uuid.RFC_4122)}
    assert {str(uuid.UUID(i)) for i in ids} == ids


def test_a_forked_process_makes_other_ids_than_its_parent() -> None:
    _new_id()  # more are made ready by this
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, " ".join(_new_id() for _ in range(100)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        theirs = {*pipe.read().split()}
    os.waitpid(child, 0)
    assert len(theirs) == 100
    assert theirs.isdisjoint(_new_id() for _ in range(100))
