package main

import (
	"errors"
	"flag"
	"fmt"

	"github.com/hibiken/asynq"
)

// redisFlags are the flags that every subcommand takes to find Redis.
type redisFlags struct {
	uri      string
	poolSize int
}

// newFlags makes the flag set of a subcommand, with the flags all of them have.
func newFlags(name string) (*flag.FlagSet, *redisFlags) {
	flags := flag.NewFlagSet("peer "+name, flag.ContinueOnError)
	redis := &redisFlags{}
	flags.StringVar(&redis.uri, "redis", "", "`URI`: redis://HOST:PORT/DB or redis-socket://PATH?db=N")
	flags.IntVar(&redis.poolSize, "pool", 0, "connections in the pool; 0 is the library's default")
	return flags, redis
}

// parse reads the arguments and answers where Redis is.
func parse(flags *flag.FlagSet, redis *redisFlags, args []string) (asynq.RedisConnOpt, error) {
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, usageError{err}
	}
	if flags.NArg() > 0 {
		return nil, usageError{fmt.Errorf("unexpected argument %q", flags.Arg(0))}
	}
	if redis.uri == "" {
		return nil, usageError{errors.New("-redis URI is required")}
	}
	opt, err := asynq.ParseRedisURI(redis.uri)
	if err != nil {
		return nil, usageError{err}
	}
	if direct, ok := opt.(asynq.RedisClientOpt); ok {
		direct.PoolSize = redis.poolSize
		return direct, nil
	}
	return opt, nil
}

// errorCode names the errors a test wants to tell apart without reading their text.
func errorCode(err error) string {
	switch {
	case err == nil:
		return ""
	case errors.Is(err, asynq.ErrDuplicateTask):
		return "duplicate"
	case errors.Is(err, asynq.ErrTaskIDConflict):
		return "conflict"
	case errors.Is(err, asynq.ErrQueueNotFound):
		return "queue_not_found"
	case errors.Is(err, asynq.ErrQueueNotEmpty):
		return "queue_not_empty"
	case errors.Is(err, asynq.ErrTaskNotFound):
		return "task_not_found"
	default:
		return "other"
	}
}

// errorText is the text of an error, empty for none.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
