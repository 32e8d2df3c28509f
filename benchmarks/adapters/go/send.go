package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hibiken/asynq"
)

// A welcome is the one payload of the benchmarks.
type welcome struct {
	UserID   int    `json:"user_id"`
	Template string `json:"template"`
}

// A sending is what adapter.py calls Sending.
type sending struct {
	handler  string
	tasks    int
	how      string
	inFlight int
	interval time.Duration
	delay    time.Duration
}

func send(args []string) error {
	flags := flag.NewFlagSet("send", flag.ExitOnError)
	url := flags.String("url", "", "redis://127.0.0.1:PORT/0")
	handler := flags.String("handler", "noop", "noop, sleep or fails_once")
	tasks := flags.Int("tasks", 0, "how many")
	how := flags.String("how", "sequential", "sequential, concurrent, raw, paced or scheduled")
	inFlight := flags.Int("in-flight", 50, "callers at once")
	interval := flags.Float64("interval-s", 0, "seconds between two tasks")
	delay := flags.Float64("delay-s", 0, "seconds until the first is due")
	if err := flags.Parse(args); err != nil {
		return err
	}
	opt, err := asynq.ParseRedisURI(*url)
	if err != nil {
		return err
	}
	ledger, err := openLedger()
	if err != nil {
		return err
	}
	client := asynq.NewClient(opt)
	defer client.Close()
	if err := inParallel(*inFlight, client.Ping); err != nil { // opens the connections
		return err
	}
	s := sending{*handler, *tasks, *how, *inFlight, seconds(*interval), seconds(*delay)}
	cpu := cpuSeconds()
	took, err := s.run(client, ledger)
	if err != nil {
		return err
	}
	answer := map[string]float64{"seconds": took.Seconds(), "cpu_seconds": cpuSeconds() - cpu}
	line, err := json.Marshal(answer)
	fmt.Println(string(line))
	return err
}

func (s sending) run(client *asynq.Client, ledger ledger) (time.Duration, error) {
	switch s.how {
	case "concurrent":
		return s.concurrently(client, s.inFlight, func(i int) ([]byte, error) {
			return json.Marshal(welcome{i, "default"})
		})
	case "sequential":
		return s.concurrently(client, 1, func(i int) ([]byte, error) {
			return json.Marshal(welcome{i, "default"})
		})
	case "raw":
		payloads, err := s.payloads()
		if err != nil {
			return 0, err
		}
		return s.concurrently(client, s.inFlight, func(i int) ([]byte, error) { return payloads[i], nil })
	case "paced":
		return s.paced(client, ledger)
	case "scheduled":
		return s.scheduled(client, ledger)
	}
	return 0, fmt.Errorf("this adapter cannot send %q; say so in systems.py", s.how)
}

func (s sending) payloads() ([][]byte, error) {
	payloads := make([][]byte, s.tasks)
	for i := range payloads {
		payload, err := json.Marshal(welcome{i, "default"})
		if err != nil {
			return nil, err
		}
		payloads[i] = payload
	}
	return payloads, nil
}

func (s sending) concurrently(
	client *asynq.Client, callers int, payload func(i int) ([]byte, error),
) (time.Duration, error) {
	var next atomic.Int64
	began := time.Now()
	err := inParallel(callers, func() error {
		for {
			i := int(next.Add(1)) - 1
			if i >= s.tasks {
				return nil
			}
			bytes, err := payload(i)
			if err != nil {
				return err
			}
			if _, err := client.Enqueue(asynq.NewTask(s.handler, bytes)); err != nil {
				return err
			}
		}
	})
	return time.Since(began), err
}

func (s sending) paced(client *asynq.Client, ledger ledger) (time.Duration, error) {
	began := time.Now()
	for i := range s.tasks {
		at := time.Now()
		if err := s.enqueue(client, i); err != nil {
			return 0, err
		}
		ledger.sent(i, at) // afterwards: to write it is no part of the way to the handler
		time.Sleep(time.Until(began.Add(time.Duration(i+1) * s.interval)))
	}
	return time.Since(began), nil
}

func (s sending) scheduled(client *asynq.Client, ledger ledger) (time.Duration, error) {
	began := time.Now()
	first := began.Add(s.delay)
	for i := range s.tasks {
		due := first.Add(time.Duration(i) * s.interval)
		ledger.sent(i, due)
		if err := s.enqueue(client, i, asynq.ProcessAt(due)); err != nil {
			return 0, err
		}
	}
	return time.Since(began), nil
}

func (s sending) enqueue(client *asynq.Client, i int, options ...asynq.Option) error {
	payload, err := json.Marshal(welcome{i, "default"})
	if err != nil {
		return err
	}
	_, err = client.Enqueue(asynq.NewTask(s.handler, payload), options...)
	return err
}

// inParallel calls work n times at once and answers the errors.
func inParallel(n int, work func() error) error {
	errs := make([]error, n)
	var group sync.WaitGroup
	for i := range n {
		group.Add(1)
		go func() {
			defer group.Done()
			errs[i] = work()
		}()
	}
	group.Wait()
	return errors.Join(errs...)
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second))
}

func cpuSeconds() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / float64(time.Second)
}
