package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/hibiken/asynq"
)

// An order is the struct whose bytes the other language has to reproduce: the uniqueness lock is
// made from what json.Marshal writes for it.
type order struct {
	UserID   int      `json:"user_id"`
	Template string   `json:"template"`
	Name     string   `json:"name"`
	Data     []byte   `json:"data"`
	Tags     []string `json:"tags"`
	Address  address  `json:"address"`
}

type address struct {
	City   string  `json:"city"`
	Zip    int     `json:"zip"`
	Billed bool    `json:"billed"`
	Note   *string `json:"note"`
}

// UnmarshalJSON gives an absent template its default, which is then written out like any value.
func (o *order) UnmarshalJSON(raw []byte) error {
	type plain order
	value := plain{Template: "default"}
	if err := json.Unmarshal(raw, &value); err != nil {
		return err
	}
	*o = order(value)
	return nil
}

// A uniqueAnswer is one output line of struct-unique.
type uniqueAnswer struct {
	Index      int    `json:"index"`
	PayloadB64 []byte `json:"payload_b64"`
	Locked     bool   `json:"locked"` // this call took the lock
	ID         string `json:"id,omitempty"`
	Error      string `json:"error,omitempty"`
	Code       string `json:"code,omitempty"`
}

func runStructUnique(args []string) error {
	flags, redis := newFlags("struct-unique")
	typename := flags.String("type", "order:place", "task type")
	queue := flags.String("queue", "default", "queue name")
	unique := flags.Duration("unique", time.Minute, "how long the lock holds")
	opt, err := parse(flags, redis, args)
	if err != nil {
		return err
	}
	client := asynq.NewClient(opt)
	defer client.Close()
	if err := client.Ping(); err != nil {
		return fmt.Errorf("redis does not answer: %w", err)
	}

	out := newLineWriter(os.Stdout)
	inputErr := eachLine(os.Stdin, func(index int, value order) {
		answer := uniqueAnswer{Index: index}
		payload, err := json.Marshal(value)
		if err == nil {
			var info *asynq.TaskInfo
			task := asynq.NewTask(*typename, payload)
			if info, err = client.Enqueue(task, asynq.Queue(*queue), asynq.Unique(*unique)); err == nil {
				answer.ID, answer.Locked = info.ID, true
			}
		}
		answer.PayloadB64, answer.Error, answer.Code = payload, errorText(err), errorCode(err)
		out.write(answer)
	})
	return errors.Join(inputErr, out.flush())
}
