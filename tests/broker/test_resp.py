"""What other programs wrote is read and written without change, whatever its bytes."""

from __future__ import annotations

from asyncq.broker.resp import pack, pack_parts, text


def test_what_is_no_utf8_goes_out_as_it_came() -> None:
    assert pack(["GET", text(b"\xff\xfe")]) == b"*2\r\n$3\r\nGET\r\n$2\r\n\xff\xfe\r\n"


def test_parts_stand_behind_others_of_a_command() -> None:
    parts = pack_parts(["b", 1, b"c\n"])
    assert b"*4\r\n$1\r\na\r\n" + parts == pack(["a", "b", 1, b"c\n"])
    assert pack_parts([]) == b""
