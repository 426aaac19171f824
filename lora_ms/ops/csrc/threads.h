// Threads that share out the work of one operator. MindSpore's own pool cannot be reached from a custom operator.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <new>
#include <thread>

namespace lora_ms {

class Threads {
  public:
    // Never destroyed: a helper may still wait when the process ends.
    static Threads &shared() {
        static Threads *all = new Threads();
        return *all;
    }

    int count() const { return count_; }

    // For all work that begins from now on; helpers are started when they are first wanted.
    void set_count(int count) { count_ = count < 1 ? 1 : count; }

    // Calls work(i) for all i in [0, tasks), in any order and on any thread; returns when all have returned. Throws
    // bad_alloc where one has, whatever its thread: MindSpore catches it on its own, and on a helper nobody does.
    void run(long tasks, const std::function<void(long)> &work) {
        if (count_ == 1 || tasks < 2 || used_.exchange(true)) {  // used: by another operator, or by what calls this
            for (long i = 0; i < tasks; i++) work(i);
            return;
        }
        for (; started_ < count_ - 1; started_++) std::thread([this, n = started_] { help(n); }).detach();
        {
            std::lock_guard<std::mutex> lock(mutex_);
            work_ = &work, tasks_ = tasks, helpers_ = count_ - 1, next_ = 0;
            open_ = true;
            round_++;
        }
        if (asleep_) wake_.notify_all();
        take();
        open_ = false;  // a helper that comes now finds nothing to do, and is not waited for
        while (inside_) relax();
        const bool failed = no_memory_.exchange(false);
        used_ = false;
        if (failed) throw std::bad_alloc();
    }

  private:
    Threads() : count_(static_cast<int>(std::thread::hardware_concurrency())) { set_count(count_); }

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }

    void take() {
        try {
            for (long i; (i = next_.fetch_add(1)) < tasks_;) (*work_)(i);
        } catch (const std::bad_alloc &) {
            no_memory_ = true;
        }
    }

    void help(int number) {
        for (long seen = 0;;) {
            wait(seen);
            seen = round_;
            inside_++;
            if (open_ && number < helpers_) take();
            inside_--;
        }
    }

    // Until round_ is not `seen`: awake for a moment, as the next operator mostly follows at once, then asleep, as
    // MindSpore's own threads want the cores.
    void wait(long seen) {
        const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
        do {
            for (int i = 0; i < 64; i++) {
                if (round_ != seen) return;
                relax();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_++;
        wake_.wait(lock, [&] { return round_ != seen; });
        asleep_--;
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<long> round_{0}, next_{0};
    std::atomic<int> inside_{0}, asleep_{0};  // helpers
    std::atomic<bool> open_{false}, used_{false}, no_memory_{false};
    const std::function<void(long)> *work_ = nullptr;
    long tasks_ = 0;
    int count_ = 1, helpers_ = 0, started_ = 0;
};

}  // namespace lora_ms
