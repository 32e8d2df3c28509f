package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"github.com/hibiken/asynq"
)

// A taskSpec is one input line of enqueue. An option that is absent is not passed to Asynq.
type taskSpec struct {
	Type          string            `json:"type"`
	PayloadB64    []byte            `json:"payload_b64"`  // absent: nil payload; "": empty, not nil
	PayloadJSON   json.RawMessage   `json:"payload_json"` // any JSON, written as encoding/json writes it
	ID            *string           `json:"id"`
	Queue         *string           `json:"queue"`
	MaxRetry      *int              `json:"max_retry"`
	TimeoutS      *float64          `json:"timeout_s"`
	DeadlineUnix  *float64          `json:"deadline_unix"`
	UniqueS       *float64          `json:"unique_s"`
	ProcessInS    *float64          `json:"process_in_s"`
	ProcessAtUnix *float64          `json:"process_at_unix"`
	RetentionS    *float64          `json:"retention_s"`
	Group         *string           `json:"group"`
	Headers       map[string]string `json:"headers"`
}

// An enqueueAnswer is one output line of enqueue.
type enqueueAnswer struct {
	Index  int    `json:"index"`
	ID     string `json:"id"`
	Queue  string `json:"queue,omitempty"`
	State  string `json:"state,omitempty"`
	Error  string `json:"error,omitempty"`
	Code   string `json:"code,omitempty"`
	AtNs   int64  `json:"at_ns"`   // when enqueue was called
	DoneNs int64  `json:"done_ns"` // when it returned
}

func runEnqueue(args []string) error {
	flags, redis := newFlags("enqueue")
	concurrency := flags.Int("concurrency", 1, "`N` tasks under way at once")
	interval := flags.Duration("interval", 0, "pause after each task read")
	opt, err := parse(flags, redis, args)
	if err != nil {
		return err
	}
	if *concurrency < 1 {
		return usageError{errors.New("-concurrency must be at least 1")}
	}
	client := asynq.NewClient(opt)
	defer client.Close()
	if err := client.Ping(); err != nil {
		return fmt.Errorf("redis does not answer: %w", err)
	}

	type job struct {
		index int
		spec  taskSpec
	}
	out := newLineWriter(os.Stdout)
	jobs := make(chan job)
	var workers sync.WaitGroup
	for range *concurrency {
		workers.Add(1)
		go func() {
			defer workers.Done()
			for j := range jobs {
				out.write(enqueue(client, j.index, j.spec))
			}
		}()
	}
	inputErr := eachLine(os.Stdin, func(index int, spec taskSpec) {
		jobs <- job{index, spec}
		time.Sleep(*interval)
	})
	close(jobs)
	workers.Wait()
	return errors.Join(inputErr, out.flush())
}

func enqueue(client *asynq.Client, index int, spec taskSpec) enqueueAnswer {
	answer := enqueueAnswer{Index: index}
	if spec.ID != nil {
		answer.ID = *spec.ID
	}
	payload, err := spec.payload()
	if err != nil {
		answer.Error, answer.Code = err.Error(), "other"
		return answer
	}
	task := asynq.NewTaskWithHeaders(spec.Type, payload, spec.Headers)
	options := spec.options()

	answer.AtNs = time.Now().UnixNano()
	info, err := client.Enqueue(task, options...)
	answer.DoneNs = time.Now().UnixNano()
	if err != nil {
		answer.Error, answer.Code = err.Error(), errorCode(err)
		return answer
	}
	answer.ID, answer.Queue, answer.State = info.ID, info.Queue, info.State.String()
	return answer
}

func (s taskSpec) payload() ([]byte, error) {
	if s.PayloadJSON == nil {
		return s.PayloadB64, nil
	}
	if s.PayloadB64 != nil {
		return nil, errors.New("payload_b64 and payload_json exclude each other")
	}
	return json.Marshal(s.PayloadJSON)
}

func (s taskSpec) options() []asynq.Option {
	var options []asynq.Option
	if s.ID != nil {
		options = append(options, asynq.TaskID(*s.ID))
	}
	if s.Queue != nil {
		options = append(options, asynq.Queue(*s.Queue))
	}
	if s.MaxRetry != nil {
		options = append(options, asynq.MaxRetry(*s.MaxRetry))
	}
	if s.TimeoutS != nil {
		options = append(options, asynq.Timeout(seconds(*s.TimeoutS)))
	}
	if s.DeadlineUnix != nil {
		options = append(options, asynq.Deadline(instant(*s.DeadlineUnix)))
	}
	if s.UniqueS != nil {
		options = append(options, asynq.Unique(seconds(*s.UniqueS)))
	}
	if s.ProcessInS != nil {
		options = append(options, asynq.ProcessIn(seconds(*s.ProcessInS)))
	}
	if s.ProcessAtUnix != nil {
		options = append(options, asynq.ProcessAt(instant(*s.ProcessAtUnix)))
	}
	if s.RetentionS != nil {
		options = append(options, asynq.Retention(seconds(*s.RetentionS)))
	}
	if s.Group != nil {
		options = append(options, asynq.Group(*s.Group))
	}
	return options
}

func seconds(s float64) time.Duration {
	return time.Duration(math.Round(s * float64(time.Second)))
}

func instant(unix float64) time.Time {
	whole, fraction := math.Modf(unix)
	return time.Unix(int64(whole), int64(seconds(fraction)))
}
