"""What other programs wrote is read and written without change, whatever its bytes."""

from __future__ import annotations

from asyncq.broker.resp import form, pack, text


def test_what_is_no_utf8_goes_out_as_it_came() -> None:
    assert pack(["GET", text(b"\xff\xfe")]) == b"*2\r\n$3\r\nGET\r\n$2\r\n\xff\xfe\r\n"


def test_a_form_that_is_filled_is_the_packed_command() -> None:
    set_key = form(b"SET", None, b"100%d", b"PX", None)
    for key, ttl in ((b"k", b"1"), (b"%b of \xff\r\n", b"250")):
        filled = set_key % (len(key), key, len(ttl), ttl)
        assert filled == pack(["SET", key, "100%d", "PX", ttl])
