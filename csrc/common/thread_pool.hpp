// One pool of worker threads for the process. The calling thread is always worker 0 and takes part.
//
// The size is FIVEDP_NUM_THREADS or the number of CPUs in the affinity mask; workers are started on first use and
// sleep between jobs. Only one job runs at a time: a second caller that finds the pool busy does its job alone.
// After a fork the child starts with an empty pool.
#pragma once

#include <functional>

namespace fivedp {

int thread_count();
void set_thread_count(int count);

// Calls task(worker) for worker = 0 .. n - 1 with n <= `wanted`, worker 0 on the calling thread, and returns when the
// caller's own task and all others have ended. While it waits for the others it calls `idle` about every millisecond.
// The task must not throw.
void run_parallel(int wanted, const std::function<void(int)>& task, const std::function<void()>& idle);

}  // namespace fivedp
