// Blocks of work that the threads take from one counter, with scratch memory for each thread and a caller who is kept
// informed. Which thread makes a block has no influence on its bits.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <new>

#include "common/thread_pool.hpp"
#include "cpu/gemm_problem.hpp"

namespace fivedp {

// Scratch is kept between calls, one buffer a thread.
inline char* scratch(std::int64_t bytes) {
    struct Free {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    thread_local std::unique_ptr<char, Free> buffer;
    thread_local std::int64_t size = 0;
    if (size < bytes) {
        buffer.reset();
        size = 0;
        buffer.reset(static_cast<char*>(::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64))));
        size = bytes;
    }
    return buffer.get();
}

// A counter of blocks that processes share: numbers in memory that all of them have mapped, 0 at first.
struct SharedTiles {
    std::int64_t* next;  // null: the blocks are this process's alone
    std::int64_t* done;
};

// A cut that processes share must not depend on the threads of any: it is made for so many.
constexpr int shared_parts = 4;

// Calls work(index, memory, poll) for index = 0 .. n - 1 on up to `threads` threads; `memory` has `bytes` bytes. `work`
// asks `poll` now and then and returns false where the answer was false. `progress` is called on the calling thread
// about every millisecond and returns false to stop all. With `shared` tiles other processes call this for the same
// blocks; it returns when none is left to be taken, which others may still be working on.
template <class Work>
void share_blocks(int threads, std::int64_t n, std::int64_t bytes, const std::function<bool()>& progress,
                  const SharedTiles& shared, const Work& work) {
    using Clock = std::chrono::steady_clock;
    constexpr auto progress_interval = std::chrono::microseconds(1500);
    std::int64_t private_next = 0;
    std::int64_t* const next = shared.next != nullptr ? shared.next : &private_next;
    std::atomic<bool> stop{false}, out_of_memory{false};
    struct Caller {
        const std::function<bool()>& progress;
        std::atomic<bool>& stop;
        Clock::time_point due;
        Clock::duration interval;
    } caller{progress, stop, Clock::now() + progress_interval, progress_interval};
    const auto ask_caller = [](void* context) {
        Caller& me = *static_cast<Caller*>(context);
        if (me.stop.load(std::memory_order_relaxed)) return false;
        if (me.progress && Clock::now() >= me.due) {
            if (!me.progress()) {
                me.stop = true;
                return false;
            }
            me.due = Clock::now() + me.interval;
        }
        return true;
    };
    const auto ask_stop = [](void* context) {
        return !static_cast<Caller*>(context)->stop.load(std::memory_order_relaxed);
    };
    const auto work_on_blocks = [&](int worker) {
        const Poll poll = worker == 0 ? Poll{ask_caller, &caller} : Poll{ask_stop, &caller};
        char* memory = nullptr;
        try {
            memory = scratch(bytes);
        } catch (const std::bad_alloc&) {
            stop = out_of_memory = true;
            return;
        }
        while (!stop) {
            const std::int64_t index = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
            if (index >= n || !work(index, memory, poll)) return;
            if (shared.done != nullptr) __atomic_fetch_add(shared.done, 1, __ATOMIC_RELEASE);
        }
    };
    if (threads <= 1 || n <= 1)
        work_on_blocks(0);
    else
        run_parallel(static_cast<int>(std::min<std::int64_t>(threads, n)), work_on_blocks,
                     [&] { ask_caller(&caller); });
    if (out_of_memory) throw std::bad_alloc();
}

}  // namespace fivedp
