package main

import (
	"fmt"
	"sync"
)

// A release is one input line of serve: it lets a task in mode block go on in another mode.
type release struct {
	ID   string `json:"release"`
	Mode string `json:"mode"`
}

// gates holds back the tasks in mode block. The zero value is ready to use.
type gates struct {
	mu   sync.Mutex
	byID map[string]chan string
}

// of returns the gate of a task; what comes out of it is the mode to go on in.
func (g *gates) of(id string) chan string {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.byID == nil {
		g.byID = make(map[string]chan string)
	}
	if g.byID[id] == nil {
		// Room for one: a release may come before the task waits.
		g.byID[id] = make(chan string, 1)
	}
	return g.byID[id]
}

func (g *gates) release(r release) error {
	if modes[r.Mode] == nil {
		return fmt.Errorf("release of %q: unknown mode %q", r.ID, r.Mode)
	}
	select {
	case g.of(r.ID) <- r.Mode:
		return nil
	default:
		return fmt.Errorf("task %q was released twice", r.ID)
	}
}
