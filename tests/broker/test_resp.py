"""What other programs wrote is read and written without change, whatever its bytes."""

from __future__ import annotations

from asyncq.broker.resp import pack, text


def test_what_is_no_utf8_goes_out_as_it_came() -> None:
    assert pack(["GET", text(b"\xff\xfe")]) == b"*2\r\n$3\r\nGET\r\n$2\r\n\xff\xfe\r\n"
