package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hibiken/asynq"
)

// modeByType lets each task choose its mode by its type.
const modeByType = "type"

type handlerSettings struct {
	mode         string
	sleep        time.Duration
	result       bool
	ignoreCancel bool
}

// A handler runs each task in its mode and reports its start and end.
type handler struct {
	handlerSettings
	out   *lineWriter
	gates gates
}

func newHandler(settings handlerSettings, out *lineWriter) (*handler, error) {
	if settings.mode != modeByType && modes[settings.mode] == nil {
		return nil, fmt.Errorf("-handler: unknown mode %q; known: %s", settings.mode, strings.Join(modeNames(), ", "))
	}
	return &handler{handlerSettings: settings, out: out}, nil
}

// A taskEvent is the output line of one start or end.
type taskEvent struct {
	Event        string            `json:"event"`
	ID           string            `json:"id"`
	Type         string            `json:"type"`
	Queue        string            `json:"queue"`
	RetryCount   int               `json:"retry_count"`
	MaxRetry     int               `json:"max_retry"`
	PayloadB64   []byte            `json:"payload_b64"`
	Headers      map[string]string `json:"headers"`
	DeadlineUnix int64             `json:"deadline_unix"`
	AtNs         int64             `json:"at_ns"`
	Err          string            `json:"err,omitempty"`
}

// ProcessTask reports the start, runs the mode, and reports the end, also when the mode panics.
func (h *handler) ProcessTask(ctx context.Context, task *asynq.Task) (err error) {
	event := newTaskEvent(ctx, task)
	h.out.write(event)
	returned := false
	defer func() {
		// No recover here: Asynq names the place of the panic in its error text.
		event.Event, event.AtNs, event.Err = "end", time.Now().UnixNano(), errorText(err)
		if !returned {
			event.Err = "panic"
		}
		h.out.write(event)
	}()
	if h.ignoreCancel {
		ctx = context.WithoutCancel(ctx)
	}
	err = h.run(ctx, task)
	returned = true
	return err
}

func newTaskEvent(ctx context.Context, task *asynq.Task) taskEvent {
	event := taskEvent{
		Event:      "start",
		AtNs:       time.Now().UnixNano(),
		Type:       task.Type(),
		PayloadB64: task.Payload(),
		Headers:    orEmpty(task.Headers()),
	}
	event.ID, _ = asynq.GetTaskID(ctx)
	event.Queue, _ = asynq.GetQueueName(ctx)
	event.RetryCount, _ = asynq.GetRetryCount(ctx)
	event.MaxRetry, _ = asynq.GetMaxRetry(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		event.DeadlineUnix = deadline.Unix()
	}
	return event
}

func (h *handler) run(ctx context.Context, task *asynq.Task) error {
	name := h.mode
	if name == modeByType {
		name, _, _ = strings.Cut(task.Type(), ":")
	}
	mode, known := modes[name]
	if !known {
		mode = echo
	}
	return mode(ctx, h, task)
}

type mode func(ctx context.Context, h *handler, task *asynq.Task) error

var modes map[string]mode

func init() { // not at the declaration, since block looks modes up
	modes = map[string]mode{
		"echo":     echo,
		"sleep":    sleepAsTyped,
		"fail":     fail,
		"flaky":    failOnce,
		"skip":     skipRetry,
		"revoke":   revoke,
		"panic":    panicOnPurpose,
		"block":    block,
		"notfound": asNotFound,
	}
}

func modeNames() []string {
	var names []string
	for name := range modes {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// A result is what echo and sleep leave with the task.
type result struct {
	By         string `json:"by"`
	ID         string `json:"id"`
	PayloadB64 []byte `json:"payload_b64"`
}

func echo(ctx context.Context, h *handler, task *asynq.Task) error {
	return h.succeedAfter(ctx, h.sleep, task)
}

// sleepAsTyped reads its time from the type, `sleep:250ms`; a type without one takes -sleep.
func sleepAsTyped(ctx context.Context, h *handler, task *asynq.Task) error {
	_, rest, _ := strings.Cut(task.Type(), ":")
	d, err := time.ParseDuration(rest)
	if err != nil {
		d = h.sleep
	}
	return h.succeedAfter(ctx, d, task)
}

func (h *handler) succeedAfter(ctx context.Context, d time.Duration, task *asynq.Task) error {
	if d > 0 {
		select {
		case <-time.After(d):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if !h.result {
		return nil
	}
	// A handler cannot see whether its task has a retention. Without one the result goes away with
	// the task, so it does no harm.
	writer := task.ResultWriter()
	data, err := json.Marshal(result{"go", writer.TaskID(), task.Payload()})
	if err != nil {
		return err
	}
	_, err = writer.Write(data)
	return err
}

func fail(_ context.Context, _ *handler, task *asynq.Task) error {
	return fmt.Errorf("%s failed on purpose", task.Type())
}

// failOnce fails the first run and succeeds from the first retry on.
func failOnce(ctx context.Context, h *handler, task *asynq.Task) error {
	if retried, _ := asynq.GetRetryCount(ctx); retried == 0 {
		return errors.New(task.Type() + " failed on purpose")
	}
	return echo(ctx, h, task)
}

func skipRetry(_ context.Context, _ *handler, task *asynq.Task) error {
	return fmt.Errorf("%s: %w", task.Type(), asynq.SkipRetry)
}

func revoke(_ context.Context, _ *handler, task *asynq.Task) error {
	return fmt.Errorf("%s: %w", task.Type(), asynq.RevokeTask)
}

func panicOnPurpose(_ context.Context, _ *handler, task *asynq.Task) error {
	panic(task.Type() + " panicked on purpose")
}

// block waits for its context, or goes on in the mode it is released to; with -ignore-cancel only
// a release ends it.
func block(ctx context.Context, h *handler, task *asynq.Task) error {
	id, _ := asynq.GetTaskID(ctx)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case name := <-h.gates.of(id):
		return modes[name](ctx, h, task)
	}
}

func asNotFound(ctx context.Context, _ *handler, task *asynq.Task) error {
	return asynq.NotFound(ctx, task)
}
