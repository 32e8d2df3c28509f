package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hibiken/asynq"
	"golang.org/x/sys/unix"
)

const benchType = "email:welcome"

// A benchPayload is the one payload of the benchmarks; user_id counts from 0.
type benchPayload struct {
	UserID   int    `json:"user_id"`
	Template string `json:"template"`
}

// A measurement is the output line of bench-enqueue and bench-drain.
type measurement struct {
	Tasks       int     `json:"tasks"`
	Concurrency int     `json:"concurrency"`
	Seconds     float64 `json:"seconds"`
	Rate        float64 `json:"rate"` // tasks a second
	Verified    int     `json:"verified"`
	CPUSeconds  float64 `json:"cpu_seconds"` // of this process, user and system
	// Only bench-drain: until the last acknowledgement was seen in Redis.
	AckedSeconds float64 `json:"acked_seconds,omitempty"`
	AckedRate    float64 `json:"acked_rate,omitempty"`
}

func runBenchEnqueue(args []string) error {
	flags, redis := newFlags("bench-enqueue")
	n := flags.Int("n", 20_000, "tasks")
	concurrency := flags.Int("concurrency", 50, "tasks under way at once")
	queue := flags.String("queue", "default", "queue name")
	opt, err := parse(flags, redis, args)
	if err != nil {
		return err
	}
	if *n < 1 || *concurrency < 1 {
		return usageError{errors.New("-n and -concurrency must be at least 1")}
	}
	client := asynq.NewClient(opt)
	defer client.Close()
	inspector := asynq.NewInspector(opt)
	defer inspector.Close()

	payloads, err := benchPayloads(*n)
	if err != nil {
		return err
	}
	if err := warmUp(client, *concurrency); err != nil {
		return err
	}
	before := pendingTasks(inspector, *queue)
	cpu, start := cpuSeconds(), time.Now()
	if err := enqueueAll(client, *queue, payloads, *concurrency); err != nil {
		return err
	}
	took := time.Since(start).Seconds()
	m := measurement{
		Tasks:       *n,
		Concurrency: *concurrency,
		Seconds:     took,
		Rate:        float64(*n) / took,
		CPUSeconds:  cpuSeconds() - cpu,
		Verified:    pendingTasks(inspector, *queue) - before,
	}
	return report(m)
}

// benchPayloads marshals before the clock starts: what is measured is the client.
func benchPayloads(n int) ([][]byte, error) {
	payloads := make([][]byte, n)
	for i := range payloads {
		payload, err := json.Marshal(benchPayload{UserID: i, Template: "default"})
		if err != nil {
			return nil, err
		}
		payloads[i] = payload
	}
	return payloads, nil
}

// warmUp opens the connections before the clock starts.
func warmUp(client *asynq.Client, concurrency int) error {
	if err := inParallel(concurrency, func(int) error { return client.Ping() }); err != nil {
		return fmt.Errorf("redis does not answer: %w", err)
	}
	return nil
}

func enqueueAll(client *asynq.Client, queue string, payloads [][]byte, concurrency int) error {
	var next atomic.Int64
	return inParallel(concurrency, func(int) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(payloads) {
				return nil
			}
			if _, err := client.Enqueue(asynq.NewTask(benchType, payloads[i]), asynq.Queue(queue)); err != nil {
				return err
			}
		}
	})
}

// inParallel calls work n times at once and answers the errors.
func inParallel(n int, work func(int) error) error {
	errs := make([]error, n)
	var group sync.WaitGroup
	for i := range n {
		group.Add(1)
		go func() {
			defer group.Done()
			errs[i] = work(i)
		}()
	}
	group.Wait()
	return errors.Join(errs...)
}

func runBenchDrain(args []string) error {
	flags, redis := newFlags("bench-drain")
	server := addServerFlags(flags, 100)
	n := flags.Int("n", 20_000, "tasks, whose user_id are 0 to n-1")
	timeout := flags.Duration("timeout", 2*time.Minute, "give up after this long")
	opt, err := parse(flags, redis, args)
	if err != nil {
		return err
	}
	config, err := server.complete()
	if err != nil {
		return err
	}
	if *n < 1 {
		return usageError{errors.New("-n must be at least 1")}
	}
	inspector := asynq.NewInspector(opt)
	defer inspector.Close()

	drain := newDrainHandler(*n)
	srv := asynq.NewServer(opt, config)
	if err := srv.Ping(); err != nil {
		return fmt.Errorf("redis does not answer: %w", err)
	}
	cpu := cpuSeconds()
	if err := srv.Start(drain); err != nil {
		return err
	}
	defer srv.Shutdown()
	select {
	case <-drain.done:
	case <-time.After(*timeout):
		return fmt.Errorf("%d of %d tasks handled within %v", drain.handled.Load(), *n, *timeout)
	}
	if !poll(*timeout, func() bool { return unfinishedTasks(inspector, config.Queues) == 0 }) {
		return fmt.Errorf("tasks were left over in the queues after %d were handled", *n)
	}
	acked := time.Since(*drain.first.Load()).Seconds()
	took := drain.last.Sub(*drain.first.Load()).Seconds()
	return report(measurement{
		Tasks:        *n,
		Concurrency:  config.Concurrency,
		Seconds:      took,
		Rate:         float64(*n) / took,
		AckedSeconds: acked,
		AckedRate:    float64(*n) / acked,
		CPUSeconds:   cpuSeconds() - cpu,
		Verified:     drain.distinct(),
	})
}

// A drainHandler decodes each payload and counts; the n-th task closes done.
type drainHandler struct {
	n       int64
	seen    []atomic.Bool
	handled atomic.Int64
	first   atomic.Pointer[time.Time]
	last    time.Time // written before done is closed
	done    chan struct{}
}

func newDrainHandler(n int) *drainHandler {
	return &drainHandler{n: int64(n), seen: make([]atomic.Bool, n), done: make(chan struct{})}
}

// ProcessTask is what the Python handler does too: a typed payload, and nothing else.
func (d *drainHandler) ProcessTask(_ context.Context, task *asynq.Task) error {
	if d.first.Load() == nil {
		now := time.Now()
		d.first.CompareAndSwap(nil, &now)
	}
	var payload benchPayload
	if err := json.Unmarshal(task.Payload(), &payload); err != nil {
		return err
	}
	if payload.UserID < 0 || payload.UserID >= len(d.seen) {
		return fmt.Errorf("user_id %d is not one of this run", payload.UserID)
	}
	d.seen[payload.UserID].Store(true)
	if d.handled.Add(1) == d.n {
		d.last = time.Now()
		close(d.done)
	}
	return nil
}

func (d *drainHandler) distinct() int {
	count := 0
	for i := range d.seen {
		if d.seen[i].Load() {
			count++
		}
	}
	return count
}

func runBenchPickup(args []string) error {
	flags, redis := newFlags("bench-pickup")
	server := addServerFlags(flags, 10)
	opt, err := parse(flags, redis, args)
	if err != nil {
		return err
	}
	out := newLineWriter(os.Stdout)
	handler := asynq.HandlerFunc(func(ctx context.Context, _ *asynq.Task) error {
		at := time.Now().UnixNano()
		id, _ := asynq.GetTaskID(ctx)
		out.write(pickup{"start", id, at})
		return nil
	})
	nothingBlocks := func(release) error { return nil }
	return serve(opt, server, handler, nothingBlocks, out)
}

type pickup struct {
	Event string `json:"event"`
	ID    string `json:"id"`
	AtNs  int64  `json:"at_ns"`
}

// report prints a measurement, and fails if its counts are wrong.
func report(m measurement) error {
	out := newLineWriter(os.Stdout)
	out.write(m)
	if m.Verified != m.Tasks {
		return errors.Join(out.flush(), fmt.Errorf("%d of %d tasks verified", m.Verified, m.Tasks))
	}
	return out.flush()
}

// pendingTasks is 0 for a queue that does not exist yet.
func pendingTasks(inspector *asynq.Inspector, queue string) int {
	info, err := inspector.GetQueueInfo(queue)
	if err != nil {
		return 0
	}
	return info.Pending
}

// unfinishedTasks counts what is neither done nor given up; it is -1 when Redis does not answer.
func unfinishedTasks(inspector *asynq.Inspector, queues map[string]int) int {
	existing, err := inspector.Queues()
	if err != nil {
		return -1
	}
	unfinished := 0
	for _, queue := range existing {
		if _, served := queues[queue]; !served {
			continue
		}
		info, err := inspector.GetQueueInfo(queue)
		if err != nil {
			return -1
		}
		unfinished += info.Pending + info.Active + info.Retry
	}
	return unfinished
}

func cpuSeconds() float64 {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / float64(time.Second)
}
