// Command adapter runs Go Asynq for the benchmarks, with the command line of adapter.py:
//
//	adapter send --url URL --handler noop --tasks 100 --how concurrent
//	adapter work --url URL --concurrency 100
//	adapter left --url URL
//	adapter version
package main

import (
	"fmt"
	"os"
	"runtime/debug"
)

var commands = map[string]func(args []string) error{
	"send":    send,
	"work":    work,
	"left":    left,
	"version": version,
}

func main() {
	name := ""
	if len(os.Args) > 1 {
		name = os.Args[1]
	}
	command, known := commands[name]
	if !known {
		fmt.Fprintln(os.Stderr, "usage: adapter send|work|left|version [flags]")
		os.Exit(2)
	}
	if err := command(os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "adapter %s: %v\n", name, err)
		os.Exit(1)
	}
}

func version([]string) error {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return fmt.Errorf("this program was built without its module's versions")
	}
	for _, module := range info.Deps {
		if module.Path == "github.com/hibiken/asynq" {
			fmt.Println(module.Version, info.GoVersion)
		}
	}
	return nil
}
