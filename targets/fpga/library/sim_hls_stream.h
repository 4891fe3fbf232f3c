// Streams for C simulation without Vitis. Plain: unbounded, stages run one after the other, as in Vitis's C simulation. With a scheduler: every stage is a
// coroutine, every stream holds `depth` words, and a network in which nobody can go on is a deadlock, which names who waits for what.
#ifndef TC_SIM_HLS_STREAM_H
#define TC_SIM_HLS_STREAM_H
#define TC_SIM_STREAMS 1
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace tc_sim {
struct process {
    std::string name, waits;
    std::function<void()> body;
    ucontext_t context;
    void* stack = nullptr;
    bool done = false;
};

// Runs processes in random order, each until it must wait; now and then one is made to pause, so that its neighbours see back-pressure.
class scheduler {
    static const size_t STACK = 256u << 20;  // reserved, not used
    std::vector<std::unique_ptr<process>> processes;
    ucontext_t main_context;
    process* running = nullptr;
    bool progress = false;
    unsigned state;

    static void enter() {
        current()->running->body();
        current()->running->done = true;
        current()->progress = true;
        swapcontext(&current()->running->context, &current()->main_context);
    }

public:
    int stall_percent;
    static scheduler*& current() {
        static scheduler* one = nullptr;
        return one;
    }
    explicit scheduler(unsigned seed, int stall) : state(seed * 2654435761u + 12345u), stall_percent(stall) { current() = this; }
    ~scheduler() {
        for (auto& p : processes)
            if (p->stack)
                munmap(p->stack, STACK);
        current() = nullptr;
    }
    unsigned random() {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        return state;
    }
    void add(const std::string& name, std::function<void()> body) {
        processes.emplace_back(new process);
        processes.back()->name = name;
        processes.back()->body = body;
    }
    // Called by a stream whose reader or writer cannot go on.
    void wait(const char* verb, const std::string& stream) {
        running->waits = std::string(verb) + " " + stream;
        swapcontext(&running->context, &main_context);
    }
    void moved() {
        progress = true;
        if (stall_percent && (int)(random() % 100) < stall_percent)
            swapcontext(&running->context, &main_context);
    }
    // True when every process came to its end.
    bool run() {
        for (auto& p : processes) {
            getcontext(&p->context);
            p->stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (p->stack == MAP_FAILED) {
                std::perror("mmap");
                std::exit(4);
            }
            p->context.uc_stack.ss_sp = p->stack;
            p->context.uc_stack.ss_size = STACK;
            p->context.uc_link = &main_context;
            makecontext(&p->context, (void (*)())enter, 0);
        }
        for (;;) {
            size_t open = 0;
            progress = false;
            size_t first = random() % processes.size();
            for (size_t i = 0; i < processes.size(); ++i) {
                running = processes[(first + i) % processes.size()].get();
                if (running->done)
                    continue;
                ++open;
                swapcontext(&main_context, &running->context);
            }
            if (!open)
                return true;
            if (!progress) {
                std::printf("DEADLOCK\n");
                for (auto& p : processes)
                    if (!p->done)
                        std::printf("  %s waits to %s\n", p->name.c_str(), p->waits.c_str());
                return false;
            }
        }
    }
};
}  // namespace tc_sim

namespace hls {
template <class T, int DEPTH = 0>
class stream {
    std::deque<T> words;
    std::string name;
    size_t depth = 0;

public:
    stream() {}
    explicit stream(const char* name_, size_t depth_ = 0) : name(name_), depth(depth_) {}
    bool empty() const { return words.empty(); }
    size_t size() const { return words.size(); }
    T read() {
        tc_sim::scheduler* s = tc_sim::scheduler::current();
        while (words.empty()) {
            if (!s) {
                std::printf("read from the empty stream %s\n", name.c_str());
                std::exit(3);
            }
            s->wait("read", name);
        }
        T word = words.front();
        words.pop_front();
        if (s)
            s->moved();
        return word;
    }
    void write(const T& word) {
        tc_sim::scheduler* s = tc_sim::scheduler::current();
        while (s && depth && words.size() >= depth)
            s->wait("write", name);
        words.push_back(word);
        if (s)
            s->moved();
    }
};
}  // namespace hls
#endif
