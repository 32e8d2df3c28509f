package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/hibiken/asynq"
	goredis "github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"
)

const (
	cancelChannel   = "asynq:cancel"
	registerTimeout = 10 * time.Second
	// Others may leave the channel just when we join it, which hides us in the count: go on then.
	subscribeTimeout = 2 * time.Second
)

// serverFlags are the flags of everything that runs a server.
type serverFlags struct {
	config    asynq.Config
	queues    string
	delay     time.Duration
	stopOnEOF bool
}

func addServerFlags(flags *flag.FlagSet, concurrency int) *serverFlags {
	s := &serverFlags{config: asynq.Config{LogLevel: asynq.ErrorLevel}}
	flags.StringVar(&s.queues, "queues", "default=1", "queues with weights: `a=6,b=3`")
	flags.BoolVar(&s.config.StrictPriority, "strict", false, "strict priority")
	flags.IntVar(&s.config.Concurrency, "concurrency", concurrency, "tasks at once")
	flags.DurationVar(&s.config.ShutdownTimeout, "shutdown-timeout", 0, "0 is Asynq's default, 8s")
	flags.DurationVar(&s.config.TaskCheckInterval, "task-check", 0, "0 is Asynq's default, 1s")
	flags.DurationVar(&s.config.DelayedTaskCheckInterval, "delayed-check", 0, "0 is Asynq's default, 5s")
	flags.DurationVar(&s.config.JanitorInterval, "janitor", 0, "0 is Asynq's default, 8s")
	flags.DurationVar(&s.delay, "retry-delay", -1, "delay of every retry; negative is Asynq's formula")
	flags.Var(&s.config.LogLevel, "log-level", "debug, info, warn, error or fatal (default error)")
	flags.BoolVar(&s.stopOnEOF, "stop-on-eof", false, "read releases from stdin, and shut down when it ends, so that no server outlives its test")
	return s
}

// complete turns the parsed flags into the server's configuration.
func (s *serverFlags) complete() (asynq.Config, error) {
	queues, err := parseQueues(s.queues)
	if err != nil {
		return asynq.Config{}, usageError{err}
	}
	s.config.Queues = queues
	if s.delay >= 0 {
		s.config.RetryDelayFunc = func(int, error, *asynq.Task) time.Duration { return s.delay }
	}
	return s.config, nil
}

func parseQueues(text string) (map[string]int, error) {
	queues := make(map[string]int)
	for _, part := range strings.Split(text, ",") {
		name, weight, found := strings.Cut(part, "=")
		n := 1
		if found {
			var err error
			if n, err = strconv.Atoi(weight); err != nil {
				return nil, fmt.Errorf("-queues: the weight of %q is no number: %q", name, weight)
			}
		}
		queues[name] = n
	}
	return queues, nil
}

func runServe(args []string) error {
	flags, redis := newFlags("serve")
	server := addServerFlags(flags, 10)
	var settings handlerSettings
	flags.StringVar(&settings.mode, "handler", modeByType, "what every task does: "+strings.Join(modeNames(), ", ")+
		"; or `MODE` type: the part of the task type before its first colon, else echo")
	flags.DurationVar(&settings.sleep, "sleep", 0, "how long echo and sleep take")
	flags.BoolVar(&settings.result, "result", true, "write a result when a task succeeds")
	flags.BoolVar(&settings.ignoreCancel, "ignore-cancel", false, "handlers do not look at their context")
	opt, err := parse(flags, redis, args)
	if err != nil {
		return err
	}
	out := newLineWriter(os.Stdout)
	handler, err := newHandler(settings, out)
	if err != nil {
		return usageError{err}
	}
	return serve(opt, server, handler, handler.gates.release, out)
}

// serve runs a server until SIGTERM, SIGINT or the end of stdin, and reports ready, stopped
// (SIGTSTP: no new tasks) and closed.
func serve(
	opt asynq.RedisConnOpt, flags *serverFlags, handler asynq.Handler, onRelease func(release) error, out *lineWriter,
) error {
	config, err := flags.complete()
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGTSTP)
	if flags.stopOnEOF {
		go func() {
			err := eachLine(os.Stdin, func(_ int, r release) {
				if err := onRelease(r); err != nil {
					fmt.Fprintf(os.Stderr, "peer: %v\n", err)
				}
			})
			if err != nil {
				fmt.Fprintf(os.Stderr, "peer: %v\n", err)
			}
			signals <- unix.SIGTERM
		}()
	}

	server := asynq.NewServer(opt, config)
	if err := server.Ping(); err != nil {
		return fmt.Errorf("redis does not answer: %w", err)
	}
	if err := startAndWait(server, opt, handler); err != nil {
		return err
	}
	out.write(lifeEvent{"ready", time.Now().UnixNano()})
	for sig := range signals {
		server.Stop()
		if sig != unix.SIGTSTP {
			break
		}
		out.write(lifeEvent{"stopped", time.Now().UnixNano()})
	}
	server.Shutdown()
	out.write(lifeEvent{"closed", time.Now().UnixNano()})
	return out.flush()
}

type lifeEvent struct {
	Event string `json:"event"`
	AtNs  int64  `json:"at_ns"`
}

// startAndWait starts the server and waits until it is registered and hears cancelations: Start
// returns before its loops have reached Redis, and a cancelation sent in that gap is lost.
func startAndWait(server *asynq.Server, opt asynq.RedisConnOpt, handler asynq.Handler) error {
	redis, ok := opt.MakeRedisClient().(goredis.UniversalClient)
	if !ok {
		return errors.New("this Redis connection cannot be used directly")
	}
	defer redis.Close()
	inspector := asynq.NewInspectorFromRedisClient(redis)

	before, err := subscribers(redis)
	if err != nil {
		return err
	}
	if err := server.Start(handler); err != nil {
		return err
	}
	if !poll(registerTimeout, func() bool { return registered(inspector) }) {
		return fmt.Errorf("the server did not register within %v", registerTimeout)
	}
	poll(subscribeTimeout, func() bool {
		now, err := subscribers(redis)
		return err == nil && now > before
	})
	return nil
}

func registered(inspector *asynq.Inspector) bool {
	servers, err := inspector.Servers()
	if err != nil {
		return false
	}
	for _, s := range servers {
		if s.PID == os.Getpid() {
			return true
		}
	}
	return false
}

func subscribers(redis goredis.UniversalClient) (int64, error) {
	counts, err := redis.PubSubNumSub(context.Background(), cancelChannel).Result()
	return counts[cancelChannel], err
}

// poll asks until the answer is yes or the time is up, and says which.
func poll(timeout time.Duration, ask func() bool) bool {
	deadline := time.Now().Add(timeout)
	for !ask() {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(time.Millisecond)
	}
	return true
}
