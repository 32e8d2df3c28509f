package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"time"

	"github.com/hibiken/asynq"
)

const sleepFor = 10 * time.Millisecond

// Asynq's defaults are 1 s and 5 s. The peers that poll are all set to poll often; and the instants
// of delayed tasks are whole seconds, so that looking more often than this gains little.
const (
	lookAtEmptyQueuesEvery  = 10 * time.Millisecond
	lookAtDelayedTasksEvery = time.Second
)

var errFailed = errors.New("fails once, as it should")

func work(args []string) error {
	flags := flag.NewFlagSet("work", flag.ExitOnError)
	url := flags.String("url", "", "redis://127.0.0.1:PORT/0")
	concurrency := flags.Int("concurrency", 10, "tasks at once")
	prefetch := flags.Int("prefetch", 0, "Asynq has none")
	queues := flags.Int("queues", 1, "1 is the queue default; more are queue-0, queue-1, ...")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *prefetch != 0 {
		return errors.New("Asynq does not prefetch")
	}
	opt, err := asynq.ParseRedisURI(*url)
	if err != nil {
		return err
	}
	ledger, err := openLedger()
	if err != nil {
		return err
	}
	server := asynq.NewServer(opt, asynq.Config{
		Concurrency:              *concurrency,
		Queues:                   queueNames(*queues),
		LogLevel:                 asynq.ErrorLevel,
		TaskCheckInterval:        lookAtEmptyQueuesEvery,
		DelayedTaskCheckInterval: lookAtDelayedTasksEvery,
		RetryDelayFunc:           func(int, error, *asynq.Task) time.Duration { return 0 },
	})
	return server.Run(newMux(ledger)) // until SIGTERM
}

func newMux(ledger ledger) *asynq.ServeMux {
	mux := asynq.NewServeMux()
	mux.HandleFunc("noop", func(_ context.Context, task *asynq.Task) error {
		payload, err := decoded(task)
		if err != nil {
			return err
		}
		ledger.ran(payload.UserID)
		return nil
	})
	mux.HandleFunc("sleep", func(_ context.Context, task *asynq.Task) error {
		payload, err := decoded(task)
		if err != nil {
			return err
		}
		ledger.started(payload.UserID)
		time.Sleep(sleepFor)
		ledger.ended(payload.UserID)
		return nil
	})
	mux.HandleFunc("fails_once", func(_ context.Context, task *asynq.Task) error {
		payload, err := decoded(task)
		if err != nil {
			return err
		}
		if ledger.ran(payload.UserID) == 1 {
			return errFailed
		}
		return nil
	})
	return mux
}

func decoded(task *asynq.Task) (welcome, error) {
	var payload welcome
	err := json.Unmarshal(task.Payload(), &payload)
	return payload, err
}

func queueNames(n int) map[string]int {
	if n == 1 {
		return map[string]int{"default": 1}
	}
	names := make(map[string]int)
	for i := range n {
		names[fmt.Sprintf("queue-%d", i)] = 1
	}
	return names
}

func left(args []string) error {
	flags := flag.NewFlagSet("left", flag.ExitOnError)
	url := flags.String("url", "", "redis://127.0.0.1:PORT/0")
	if err := flags.Parse(args); err != nil {
		return err
	}
	opt, err := asynq.ParseRedisURI(*url)
	if err != nil {
		return err
	}
	inspector := asynq.NewInspector(opt)
	defer inspector.Close()
	queues, err := inspector.Queues()
	if err != nil {
		return err
	}
	count := 0
	for _, queue := range queues {
		info, err := inspector.GetQueueInfo(queue)
		if err != nil {
			return err
		}
		count += info.Pending + info.Active + info.Scheduled + info.Retry
	}
	fmt.Println(count)
	return nil
}
