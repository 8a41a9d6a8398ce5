#include "common/thread_pool.hpp"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fivedp {
namespace {

int default_thread_count() {
    if (const char* text = std::getenv("FIVEDP_NUM_THREADS")) {
        const int count = std::atoi(text);
        if (count > 0) return count;
    }
#ifdef __linux__
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask) == 0) return CPU_COUNT(&mask) > 0 ? CPU_COUNT(&mask) : 1;
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count > 0 ? static_cast<int>(count) : 1;
}

struct Pool {
    std::mutex owner;  // held by the caller for the length of a job
    std::mutex lock;   // guards all below
    std::condition_variable wake, done;
    std::vector<std::thread> workers;
    const std::function<void(int)>* task = nullptr;
    int active = 0;   // workers 1 .. active take part in the current job
    int running = 0;  // of which so many have not ended
    unsigned long long job = 0;
    bool closing = false;

    void work(int worker, unsigned long long seen) {
        std::unique_lock<std::mutex> guard(lock);
        for (;;) {
            wake.wait(guard, [&] { return closing || job != seen; });
            if (closing) return;
            seen = job;
            if (worker > active) continue;
            const std::function<void(int)>* current = task;
            guard.unlock();
            (*current)(worker);
            guard.lock();
            if (--running == 0) done.notify_all();
        }
    }

    void grow(int count) {  // with `lock` held
        while (static_cast<int>(workers.size()) < count) {
            const int worker = static_cast<int>(workers.size()) + 1;
            const unsigned long long seen = job;
            workers.emplace_back([this, worker, seen] { work(worker, seen); });
        }
    }

    ~Pool() {
        {
            std::lock_guard<std::mutex> guard(lock);
            closing = true;
        }
        wake.notify_all();
        for (std::thread& worker : workers) worker.join();
    }
};

int configured_count = 0;  // 0: not asked yet
Pool* the_pool = nullptr;

// The child of a fork has none of the threads, and its copies of their locks may be in any state: forget them all.
void forget_pool() {
    the_pool = nullptr;
}

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
    static std::mutex creation;
    std::lock_guard<std::mutex> guard(creation);
    // Never destroyed: at exit the workers sleep, and joining them from a static destructor can deadlock.
    if (the_pool == nullptr) the_pool = new Pool;
    return *the_pool;
}

}  // namespace

int thread_count() {
    if (configured_count == 0) configured_count = default_thread_count();
    return configured_count;
}

void set_thread_count(int count) {
    configured_count = count;
}

void run_parallel(int wanted, const std::function<void(int)>& task, const std::function<void()>& idle) {
    if (wanted <= 1) return task(0);
    Pool& shared = pool();
    std::unique_lock<std::mutex> ownership(shared.owner, std::try_to_lock);
    if (!ownership.owns_lock()) return task(0);
    {
        std::lock_guard<std::mutex> guard(shared.lock);
        try {
            shared.grow(wanted - 1);
        } catch (const std::exception&) {
            // No further thread to be had: go on with those there are.
        }
        shared.task = &task;
        shared.active =
            wanted - 1 < static_cast<int>(shared.workers.size()) ? wanted - 1 : static_cast<int>(shared.workers.size());
        shared.running = shared.active;
        ++shared.job;
    }
    shared.wake.notify_all();
    task(0);
    std::unique_lock<std::mutex> guard(shared.lock);
    while (!shared.done.wait_for(guard, std::chrono::milliseconds(1), [&] { return shared.running == 0; })) {
        guard.unlock();
        idle();
        guard.lock();
    }
}

}  // namespace fivedp
