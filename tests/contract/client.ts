// A client on generated stubs. It is compiled, not run: what it needs of the contract must be there, with its types.

import { credentials, Metadata } from "@grpc/grpc-js";

import { CallStyle } from "./gen/lattice/v1/task";
import { GetResultRequest, ResultsServiceClient, WatchRunResponse } from "./gen/lattice/v1/results";
import { RunState, TaskRun } from "./gen/lattice/v1/run";
import { RunWorkflowRequest, RunWorkflowResponse, WorkflowServiceClient } from "./gen/lattice/v1/workflow";

const request: RunWorkflowRequest = RunWorkflowRequest.fromPartial({
  runId: "run-1",
  workflow: {
    functions: { mean: { entrypoint: "statistics:mean", python: { callStyle: CallStyle.CALL_STYLE_KEYWORDS } } },
    tasks: [
      { taskId: "mean", function: "mean", outputs: ["result"], inputs: { data: { payload: { json: "[1, 2]" } } } },
      { taskId: "again", function: "mean", maxParallel: 3, inputs: { data: { output: { taskId: "mean", path: [{ index: 0 }] } } } },
    ],
  },
});

// @ts-expect-error: the contract has no such field.
RunWorkflowRequest.fromPartial({ runID: "run-1" });

const workflows = new WorkflowServiceClient("127.0.0.1:50051", credentials.createInsecure());
const results = new ResultsServiceClient("127.0.0.1:50051", credentials.createInsecure());
const metadata = new Metadata();
metadata.set("authorization", "Bearer token");

workflows.runWorkflow(request, metadata, (error, response: RunWorkflowResponse) => {
  if (error || response.run?.state !== RunState.RUN_STATE_RUNNING) return;
  const stream = results.watchRun({ runId: response.run.runId, afterSequence: 0, excludeLogs: true, taskIds: [] }, metadata);
  stream.on("data", ({ events, sequence, complete }: WatchRunResponse) => {
    for (const event of events) console.log(event.sequence, event.taskSucceeded?.outputs["result"]?.json);
    if (complete) console.log(sequence);
  });
  results.getResult(GetResultRequest.fromPartial({ runId: "run-1", wait: { seconds: 60 } }), (failed, answer) => {
    const tasks: TaskRun[] = failed ? [] : answer.finalTasks;
    console.log(tasks.map(({ taskId, failure }) => failure?.message ?? taskId));
  });
});
