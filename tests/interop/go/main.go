// Command peer is the Go side of the interop tests: real Go Asynq, driven by flags
// and JSON lines, so that a test in another language can talk to it.
//
// Answers go to stdout, one JSON object a line; errors go to stderr.
// Exit codes: 0 done, 1 the work failed (Redis is away, counts are wrong), 2 the call was wrong.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
)

type command struct {
	name    string
	summary string
	run     func(args []string) error
}

var commands = []command{
	{"enqueue", "enqueue the tasks read from stdin", runEnqueue},
	{"struct-unique", "marshal structs read from stdin and enqueue them unique", runStructUnique},
	{"serve", "run a server that reports each start and end of a task", runServe},
	{"inspect", "answer inspector commands read from stdin", runInspect},
}

// A usageError is the caller's mistake: an unknown flag, or an input line that does not parse.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func main() {
	os.Exit(exitCode(run(os.Args[1:])))
}

func run(args []string) error {
	if len(args) == 0 {
		return usageError{errors.New("no subcommand given; " + usage())}
	}
	for _, c := range commands {
		if c.name == args[0] {
			return c.run(args[1:])
		}
	}
	return usageError{fmt.Errorf("unknown subcommand %q; %s", args[0], usage())}
}

func usage() string {
	text := "peer SUBCOMMAND -redis URI [flags], where SUBCOMMAND is one of:"
	for _, c := range commands {
		text += fmt.Sprintf("\n  %-14s %s", c.name, c.summary)
	}
	return text
}

func exitCode(err error) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	fmt.Fprintf(os.Stderr, "peer: %v\n", err)
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}
