#include "common/threads.h"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace maskformer_fast {
namespace {

// Time that a waiting thread polls before it sleeps. Waking a sleeping thread takes some tens of microseconds.
constexpr std::chrono::microseconds kSpin{50};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Lets one thread wait for a change of an atomic variable, which both threads access with sequential consistency.
// With that memory order, either the waiting thread sees the change, or the thread that changes it sees `asleep_`.
class Signal {
 public:
  template <class Ready>
  void wait(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (ready()) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_ = true;
    wake_.wait(lock, ready);
    asleep_ = false;
  }

  void notify() {
    if (!asleep_) return;
    // the waiting thread holds the mutex from before it sets asleep_ until it sleeps, so it cannot miss the
    // notification
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_one();
  }

 private:
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Helper {
 public:
  using Run = void (*)(const void* context, int worker);

  explicit Helper(int worker) : worker_(worker) {
    // The thread is never joined and the Helper never freed: no moment at exit is right for it, and it only sleeps.
    std::thread([this] { serve(); }).detach();
  }

  void offer(Run run, const void* context) {
    run_ = run;
    context_ = context;
    state_ = State::offered;
    offered_.notify();
  }

  // Withdraws the offer where the thread has not started, else waits until the thread is done.
  void finish() {
    State expected = State::offered;
    if (state_.compare_exchange_strong(expected, State::idle)) return;
    finished_.wait([this] { return state_ == State::idle; });
  }

 private:
  enum class State { idle, offered, running };

  void serve() {
    for (;;) {
      offered_.wait([this] { return state_ == State::offered; });
      State expected = State::offered;
      if (!state_.compare_exchange_strong(expected, State::running)) continue;
      run_(context_, worker_);
      state_ = State::idle;
      finished_.notify();
    }
  }

  const int worker_;
  std::atomic<State> state_{State::idle};
  Run run_ = nullptr;
  const void* context_ = nullptr;
  Signal offered_, finished_;
};

struct Pool {
  std::atomic<bool> busy{false};
  std::vector<std::unique_ptr<Helper>> helpers;  // accessed only by the thread that set `busy`

  // Starts helpers up to `count`. Returns how many of them there are, fewer where threads or memory run out.
  int grow_to(int count) {
    try {
      while (static_cast<int>(helpers.size()) < count) {
        helpers.emplace_back();  // the slot first, as this may throw and the thread needs a slot
        helpers.back() = std::make_unique<Helper>(static_cast<int>(helpers.size()));
      }
    } catch (const std::exception&) {  // the helpers that run do all of the work
      if (!helpers.empty() && !helpers.back()) helpers.pop_back();
    }
    return static_cast<int>(helpers.size()) < count ? static_cast<int>(helpers.size()) : count;
  }
};

std::atomic<Pool*> current_pool{nullptr};

// Drops the pool in the child of a fork: threads do not survive a fork, and mutexes may be left locked.
void forget_pool() { current_pool = nullptr; }
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_pool);

Pool& pool() {
  if (Pool* known = current_pool) return *known;
  auto made = std::make_unique<Pool>();
  Pool* expected = nullptr;
  return current_pool.compare_exchange_strong(expected, made.get()) ? *made.release() : *expected;
}

}  // namespace

void run_on_threads(int helpers, void (*run)(const void* context, int worker), const void* context) {
  Pool& shared = pool();
  if (shared.busy.exchange(true)) {
    run(context, 0);
    return;
  }
  helpers = shared.grow_to(helpers);
  for (int h = 0; h < helpers; ++h) shared.helpers[h]->offer(run, context);
  run(context, 0);
  for (int h = 0; h < helpers; ++h) shared.helpers[h]->finish();
  shared.busy = false;
}

}  // namespace maskformer_fast
