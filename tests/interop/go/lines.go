package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
)

// A lineWriter writes JSON lines from many goroutines. Lines that come while one flush is under way
// go out together with the next, so no line waits for a timer and a busy server pays few writes.
type lineWriter struct {
	mu    sync.Mutex
	buf   *bufio.Writer
	enc   *json.Encoder
	dirty chan struct{}
}

func newLineWriter(w io.Writer) *lineWriter {
	buf := bufio.NewWriterSize(w, 1<<16)
	out := &lineWriter{buf: buf, enc: json.NewEncoder(buf), dirty: make(chan struct{}, 1)}
	go func() {
		for range out.dirty {
			if out.flush() != nil {
				return // the reader is gone; the last flush of the subcommand reports it
			}
		}
	}()
	return out
}

// write adds one line. An error stays with the buffer and comes out of flush.
func (w *lineWriter) write(value any) {
	w.mu.Lock()
	_ = w.enc.Encode(value)
	w.mu.Unlock()
	select {
	case w.dirty <- struct{}{}:
	default: // a flush is already due
	}
}

func (w *lineWriter) flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Flush()
}

// eachLine calls handle for each JSON value on r, with its index, until r ends.
// Newlines between values are optional; a field that T does not have is an error.
func eachLine[T any](r io.Reader, handle func(index int, value T)) error {
	dec := json.NewDecoder(bufio.NewReaderSize(r, 1<<16))
	dec.DisallowUnknownFields()
	for index := 0; ; index++ {
		var value T
		err := dec.Decode(&value)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return usageError{fmt.Errorf("stdin, value %d: %w", index, err)}
		}
		handle(index, value)
	}
}
