package main

import (
	"errors"
	"os"
	"syscall"
	"time"
	"unsafe"
)

// A ledger is the memory of ledger.py: four numbers a task, which are the Unix nanoseconds when it
// was sent, first started and last ended, and how often it ran.
type ledger []int64

const (
	sentAt = iota
	startedAt
	endedAt
	runs
	rowLength
)

func openLedger() (ledger, error) {
	path := os.Getenv("BENCH_LEDGER")
	if path == "" {
		return nil, errors.New("BENCH_LEDGER must name the ledger's file")
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(
		int(file.Fd()), 0, int(info.Size()), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED,
	)
	if err != nil {
		return nil, err
	}
	return unsafe.Slice((*int64)(unsafe.Pointer(&memory[0])), len(memory)/8), nil
}

func (l ledger) sent(i int, at time.Time) {
	l[i*rowLength+sentAt] = at.UnixNano()
}

// ran notes a run with no time between start and end, and returns how often the task ran by now.
func (l ledger) ran(i int) int64 {
	row := l[i*rowLength:][:rowLength]
	now := time.Now().UnixNano()
	if row[startedAt] == 0 {
		row[startedAt] = now
	}
	row[runs]++
	row[endedAt] = now
	return row[runs]
}

func (l ledger) started(i int) {
	row := l[i*rowLength:][:rowLength]
	if row[startedAt] == 0 {
		row[startedAt] = time.Now().UnixNano()
	}
	row[runs]++
}

func (l ledger) ended(i int) {
	l[i*rowLength+endedAt] = time.Now().UnixNano()
}
