package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/hibiken/asynq"
)

// A query is one input line of inspect. Which fields it needs depends on cmd.
type query struct {
	Cmd   string `json:"cmd"`
	Queue string `json:"queue"`
	ID    string `json:"id"`
	State string `json:"state"`
	Group string `json:"group"`
	Page  *int   `json:"page"`
	Size  *int   `json:"size"`
	Days  int    `json:"days"`
	Force bool   `json:"force"`
}

// A reply is one output line of inspect, in the order of the queries.
type reply struct {
	OK    bool   `json:"ok"`
	Value any    `json:"value"`
	Error string `json:"error,omitempty"`
	Code  string `json:"code,omitempty"`
}

var queries = map[string]func(*asynq.Inspector, query) (any, error){
	"queues":       func(i *asynq.Inspector, _ query) (any, error) { return sortedQueues(i) },
	"queue_info":   func(i *asynq.Inspector, q query) (any, error) { return queueInfo(i, q.Queue) },
	"task_info":    func(i *asynq.Inspector, q query) (any, error) { return taskInfo(i, q.Queue, q.ID) },
	"list":         func(i *asynq.Inspector, q query) (any, error) { return listTasks(i, q) },
	"servers":      func(i *asynq.Inspector, _ query) (any, error) { return servers(i) },
	"history":      func(i *asynq.Inspector, q query) (any, error) { return history(i, q.Queue, q.Days) },
	"delete_task":  func(i *asynq.Inspector, q query) (any, error) { return nil, i.DeleteTask(q.Queue, q.ID) },
	"run_task":     func(i *asynq.Inspector, q query) (any, error) { return nil, i.RunTask(q.Queue, q.ID) },
	"archive_task": func(i *asynq.Inspector, q query) (any, error) { return nil, i.ArchiveTask(q.Queue, q.ID) },
	"cancel":       func(i *asynq.Inspector, q query) (any, error) { return nil, i.CancelProcessing(q.ID) },
	"pause":        func(i *asynq.Inspector, q query) (any, error) { return nil, i.PauseQueue(q.Queue) },
	"unpause":      func(i *asynq.Inspector, q query) (any, error) { return nil, i.UnpauseQueue(q.Queue) },
	"delete_queue": func(i *asynq.Inspector, q query) (any, error) { return nil, i.DeleteQueue(q.Queue, q.Force) },
}

func runInspect(args []string) error {
	flags, redis := newFlags("inspect")
	opt, err := parse(flags, redis, args)
	if err != nil {
		return err
	}
	inspector := asynq.NewInspector(opt)
	defer inspector.Close()

	out := newLineWriter(os.Stdout)
	inputErr := eachLine(os.Stdin, func(_ int, q query) { out.write(answer(inspector, q)) })
	return errors.Join(inputErr, out.flush())
}

func answer(inspector *asynq.Inspector, q query) reply {
	ask, known := queries[q.Cmd]
	if !known {
		return reply{Error: fmt.Sprintf("unknown cmd %q", q.Cmd), Code: "usage"}
	}
	value, err := ask(inspector, q)
	if err != nil {
		return reply{Error: err.Error(), Code: errorCode(err)}
	}
	return reply{OK: true, Value: value}
}

func sortedQueues(i *asynq.Inspector) ([]string, error) {
	names, err := i.Queues()
	slices.Sort(names)
	return names, err
}

type queueView struct {
	Queue          string  `json:"queue"`
	MemoryUsage    int64   `json:"memory_usage"`
	LatencyS       float64 `json:"latency_s"`
	Size           int     `json:"size"`
	Groups         int     `json:"groups"`
	Pending        int     `json:"pending"`
	Active         int     `json:"active"`
	Scheduled      int     `json:"scheduled"`
	Retry          int     `json:"retry"`
	Archived       int     `json:"archived"`
	Completed      int     `json:"completed"`
	Aggregating    int     `json:"aggregating"`
	Processed      int     `json:"processed"`
	Failed         int     `json:"failed"`
	ProcessedTotal int     `json:"processed_total"`
	FailedTotal    int     `json:"failed_total"`
	Paused         bool    `json:"paused"`
}

func queueInfo(i *asynq.Inspector, queue string) (any, error) {
	info, err := i.GetQueueInfo(queue)
	if err != nil {
		return nil, err
	}
	return queueView{
		Queue:          info.Queue,
		MemoryUsage:    info.MemoryUsage,
		LatencyS:       info.Latency.Seconds(),
		Size:           info.Size,
		Groups:         info.Groups,
		Pending:        info.Pending,
		Active:         info.Active,
		Scheduled:      info.Scheduled,
		Retry:          info.Retry,
		Archived:       info.Archived,
		Completed:      info.Completed,
		Aggregating:    info.Aggregating,
		Processed:      info.Processed,
		Failed:         info.Failed,
		ProcessedTotal: info.ProcessedTotal,
		FailedTotal:    info.FailedTotal,
		Paused:         info.Paused,
	}, nil
}

// A taskView has every field of asynq.TaskInfo; instants are unix seconds, null for none.
type taskView struct {
	ID            string            `json:"id"`
	Queue         string            `json:"queue"`
	Type          string            `json:"type"`
	PayloadB64    []byte            `json:"payload_b64"`
	Headers       map[string]string `json:"headers"`
	State         string            `json:"state"`
	MaxRetry      int               `json:"max_retry"`
	Retried       int               `json:"retried"`
	LastErr       string            `json:"last_err"`
	LastFailedAt  *float64          `json:"last_failed_at"`
	TimeoutS      float64           `json:"timeout_s"`
	Deadline      *float64          `json:"deadline"`
	Group         string            `json:"group"`
	NextProcessAt *float64          `json:"next_process_at"`
	IsOrphaned    bool              `json:"is_orphaned"`
	RetentionS    float64           `json:"retention_s"`
	CompletedAt   *float64          `json:"completed_at"`
	ResultB64     []byte            `json:"result_b64"`
}

func viewTask(info *asynq.TaskInfo) taskView {
	return taskView{
		ID:            info.ID,
		Queue:         info.Queue,
		Type:          info.Type,
		PayloadB64:    info.Payload,
		Headers:       orEmpty(info.Headers),
		State:         info.State.String(),
		MaxRetry:      info.MaxRetry,
		Retried:       info.Retried,
		LastErr:       info.LastErr,
		LastFailedAt:  unixOrNil(info.LastFailedAt),
		TimeoutS:      info.Timeout.Seconds(),
		Deadline:      unixOrNil(info.Deadline),
		Group:         info.Group,
		NextProcessAt: unixOrNil(info.NextProcessAt),
		IsOrphaned:    info.IsOrphaned,
		RetentionS:    info.Retention.Seconds(),
		CompletedAt:   unixOrNil(info.CompletedAt),
		ResultB64:     info.Result,
	}
}

func taskInfo(i *asynq.Inspector, queue, id string) (any, error) {
	info, err := i.GetTaskInfo(queue, id)
	if err != nil {
		return nil, err
	}
	return viewTask(info), nil
}

func listTasks(i *asynq.Inspector, q query) (any, error) {
	var options []asynq.ListOption
	if q.Page != nil {
		options = append(options, asynq.Page(*q.Page))
	}
	if q.Size != nil {
		options = append(options, asynq.PageSize(*q.Size))
	}
	infos, err := listState(i, q, options)
	if err != nil {
		return nil, err
	}
	views := make([]taskView, len(infos))
	for n, info := range infos {
		views[n] = viewTask(info)
	}
	return views, nil
}

func listState(i *asynq.Inspector, q query, options []asynq.ListOption) ([]*asynq.TaskInfo, error) {
	switch q.State {
	case "pending":
		return i.ListPendingTasks(q.Queue, options...)
	case "active":
		return i.ListActiveTasks(q.Queue, options...)
	case "scheduled":
		return i.ListScheduledTasks(q.Queue, options...)
	case "retry":
		return i.ListRetryTasks(q.Queue, options...)
	case "archived":
		return i.ListArchivedTasks(q.Queue, options...)
	case "completed":
		return i.ListCompletedTasks(q.Queue, options...)
	case "aggregating":
		return i.ListAggregatingTasks(q.Queue, q.Group, options...)
	default:
		return nil, fmt.Errorf("unknown state %q", q.State)
	}
}

type serverView struct {
	ID             string         `json:"id"`
	Host           string         `json:"host"`
	PID            int            `json:"pid"`
	Concurrency    int            `json:"concurrency"`
	Queues         map[string]int `json:"queues"`
	StrictPriority bool           `json:"strict_priority"`
	Started        *float64       `json:"started"`
	Status         string         `json:"status"`
	ActiveWorkers  []workerView   `json:"active_workers"`
}

type workerView struct {
	TaskID     string   `json:"task_id"`
	TaskType   string   `json:"task_type"`
	PayloadB64 []byte   `json:"payload_b64"`
	Queue      string   `json:"queue"`
	Started    *float64 `json:"started"`
	Deadline   *float64 `json:"deadline"`
}

func servers(i *asynq.Inspector) (any, error) {
	infos, err := i.Servers()
	if err != nil {
		return nil, err
	}
	views := make([]serverView, len(infos))
	for n, info := range infos {
		views[n] = serverView{
			ID:             info.ID,
			Host:           info.Host,
			PID:            info.PID,
			Concurrency:    info.Concurrency,
			Queues:         info.Queues,
			StrictPriority: info.StrictPriority,
			Started:        unixOrNil(info.Started),
			Status:         info.Status,
			ActiveWorkers:  viewWorkers(info.ActiveWorkers),
		}
	}
	return views, nil
}

func viewWorkers(infos []*asynq.WorkerInfo) []workerView {
	views := make([]workerView, len(infos))
	for n, info := range infos {
		views[n] = workerView{
			TaskID:     info.TaskID,
			TaskType:   info.TaskType,
			PayloadB64: info.TaskPayload,
			Queue:      info.Queue,
			Started:    unixOrNil(info.Started),
			Deadline:   unixOrNil(info.Deadline),
		}
	}
	return views
}

type dayView struct {
	Date      string `json:"date"`
	Processed int    `json:"processed"`
	Failed    int    `json:"failed"`
}

func history(i *asynq.Inspector, queue string, days int) (any, error) {
	stats, err := i.History(queue, days)
	if err != nil {
		return nil, err
	}
	views := make([]dayView, len(stats))
	for n, day := range stats {
		views[n] = dayView{day.Date.UTC().Format(time.DateOnly), day.Processed, day.Failed}
	}
	return views, nil
}

// orEmpty keeps null out of the output.
func orEmpty(headers map[string]string) map[string]string {
	if headers == nil {
		return map[string]string{}
	}
	return headers
}

func unixOrNil(t time.Time) *float64 {
	if t.IsZero() {
		return nil
	}
	unix := float64(t.UnixNano()) / float64(time.Second)
	return &unix
}
