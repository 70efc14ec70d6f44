// Package lattice is a client of Lattice, from the contract alone.
package lattice

import (
	"context"
	"fmt"
	"io"
	"math/rand"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "example.com/lattice/gen/lattice/v1"
)

const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 2 * time.Second
	callLimit  = 20 * time.Second
	// Patience is for how long a server that does not answer is tried again.
	Patience = 30 * time.Second
)

// Client is a connection to a server; safe to share.
type Client struct {
	connection *grpc.ClientConn
	workflows  pb.WorkflowServiceClient
	results    pb.ResultsServiceClient
	patience   time.Duration
}

// New returns a client of the server at HOST:PORT; for the environment see `dial`.
func New(target string, patience time.Duration) (*Client, error) {
	connection, err := dial(target)
	if err != nil {
		return nil, err
	}
	workflows, results := pb.NewWorkflowServiceClient(connection), pb.NewResultsServiceClient(connection)
	return &Client{connection, workflows, results, patience}, nil
}

// Close closes the connection; runs go on.
func (c *Client) Close() error { return c.connection.Close() }

// Execute starts a run and hands its events to seen, each once and in order, to its end.
//
// A stream that breaks ends nothing: the run has an id that the caller chose, so asking for it again is safe until the
// server has accepted it; from then on WatchRun goes on after the last event seen. An error of seen ends the reading,
// not the run.
func (c *Client) Execute(ctx context.Context, runID string, spec *pb.WorkflowSpec, seen func(*pb.RunEvent) error) error {
	watch := &watching{client: c, runID: runID, seen: seen}
	source := &pb.RunWorkflowRequest_Workflow{Workflow: spec}
	start := &pb.RunWorkflowRequest{RunId: runID, Source: source}
	isAccepted := false
	return c.persist(ctx, func() (bool, error) {
		if !isAccepted {
			limited, cancel := context.WithTimeout(ctx, callLimit)
			defer cancel()
			if _, err := c.workflows.RunWorkflow(limited, start); err != nil {
				return false, err
			}
			isAccepted = true
		}
		return watch.once(ctx)
	})
}

// watching is the reading of a run's events, over as many streams as it takes.
type watching struct {
	client   *Client
	runID    string
	seen     func(*pb.RunEvent) error
	sequence int64
}

// once reads one stream; it returns whether anything came.
func (w *watching) once(ctx context.Context) (bool, error) {
	streaming, cancel := context.WithCancel(ctx)
	defer cancel()
	request := &pb.WatchRunRequest{RunId: w.runID, AfterSequence: w.sequence}
	stream, err := w.client.results.WatchRun(streaming, request)
	for isFirst := true; err == nil; isFirst = false {
		var response *pb.WatchRunResponse
		if response, err = stream.Recv(); err == io.EOF {
			err = status.Error(codes.Unavailable, "the stream ended before the run did")
		}
		if err != nil {
			return !isFirst, err
		}
		for _, event := range response.Events {
			if err := w.seen(event); err != nil {
				return true, fatal{err}
			}
		}
		w.sequence = response.Sequence
		if response.Complete {
			return true, nil
		}
	}
	return false, err
}

// Outputs waits for the end of a run and returns the outputs of its final tasks, by task id. It is an error when the
// run did not succeed.
func (c *Client) Outputs(ctx context.Context, runID string) (map[string]map[string]*pb.Payload, error) {
	var answer *pb.GetResultResponse
	request := &pb.GetResultRequest{RunId: runID, Wait: durationpb.New(callLimit / 2)}
	err := c.persist(ctx, func() (isHeard bool, err error) {
		for err == nil && (answer == nil || !hasEnded(answer.Run.State)) {
			limited, cancel := context.WithTimeout(ctx, callLimit)
			answer, err = c.results.GetResult(limited, request)
			cancel()
			isHeard = isHeard || err == nil
		}
		return isHeard, err
	})
	if err != nil {
		return nil, err
	}
	if answer.Run.State != pb.RunState_RUN_STATE_SUCCEEDED {
		return nil, fmt.Errorf("%s: %s", answer.Run.State, answer.Run.GetFailure().GetMessage())
	}
	found := map[string]map[string]*pb.Payload{}
	for _, task := range answer.FinalTasks {
		found[task.TaskId] = task.Outputs
	}
	return found, nil
}

func hasEnded(state pb.RunState) bool {
	return state != pb.RunState_RUN_STATE_RUNNING && state != pb.RunState_RUN_STATE_CANCELLING
}

// fatal is an error that trying again would not change.
type fatal struct{ error }

func (f fatal) Unwrap() error { return f.error }

// persist repeats a call until it succeeds, fails for good, or nothing was heard of the server for too long.
func (c *Client) persist(ctx context.Context, call func() (isHeard bool, err error)) error {
	wait, heard := minBackoff, time.Now()
	for {
		isHeard, err := call()
		if final, ok := err.(fatal); ok {
			return final.error
		}
		if err == nil || !isWorthAnother(ctx, err) {
			return err
		}
		if isHeard {
			wait, heard = minBackoff, time.Now()
		}
		if time.Since(heard) > c.patience {
			return fmt.Errorf("nothing was heard of the server for %v: %w", c.patience, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		// Spread, so that those who lost a server do not come back together.
		case <-time.After(time.Duration(rand.Int63n(int64(wait)))):
		}
		if wait *= 2; wait > maxBackoff {
			wait = maxBackoff
		}
	}
}

func isWorthAnother(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.Internal, codes.Canceled, codes.DeadlineExceeded:
		return true
	}
	return false
}
