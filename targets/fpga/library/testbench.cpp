// Runs the kernel on the vectors of vectors.h and compares every element with the integer reference. Exit status: 0 equal, 1 different, 2 usage, 3 deadlock.
//   g++ -std=c++14 -O1 -DTC_SIM -I. kernel.cpp testbench.cpp -o testbench && ./testbench      without Vitis
//   testbench --fifo [--depth D] [--stall P] [--seed S]    streams hold what the plan says (or D words), P % of the steps pause (without Vitis only)
//   testbench [--fifo ...] --run IN OUT                    other inputs: bytes in, 32-bit integers out
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernel.h"
#include "vectors.h"

typedef std::vector<std::vector<int> > table;

static void feed(@IN_STREAM@& input, const std::vector<int>& x) {
    for (int i = 0; i < @IN_COUNT@; i += @IN_LANES@) {
        tc_word<@IN_TYPE@, @IN_LANES@> word;
        for (int l = 0; l < @IN_LANES@; ++l)
            word.v[l] = x[i + l];
        input.write(word);
    }
}

static void drain(@OUT_STREAM@& output, std::vector<int>& y) {
    for (int i = 0; i < @OUT_COUNT@; i += @OUT_LANES@) {
        tc_word<@OUT_TYPE@, @OUT_LANES@> word = output.read();
        for (int l = 0; l < @OUT_LANES@; ++l)
            y.push_back((int)word.v[l]);
    }
}

int main(int argc, char** argv) {
    bool fifo = false;
    int depth = 0, stall = 0, seed = 1;
    const char *in_path = 0, *out_path = 0;
    for (int i = 1; i < argc; ++i) {
        if (!strcmp(argv[i], "--fifo"))
            fifo = true;
        else if (!strcmp(argv[i], "--depth") && i + 1 < argc)
            depth = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--stall") && i + 1 < argc)
            stall = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--seed") && i + 1 < argc)
            seed = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--run") && i + 2 < argc) {
            in_path = argv[++i];
            out_path = argv[++i];
        } else {
            printf("unknown argument %s\n", argv[i]);
            return 2;
        }
    }
    table inputs, outputs;
    if (in_path) {
        FILE* file = fopen(in_path, "rb");
        if (!file)
            return 2;
        std::vector<unsigned char> bytes(@IN_COUNT@);
        while (fread(bytes.data(), 1, bytes.size(), file) == bytes.size())
            inputs.push_back(std::vector<int>(bytes.begin(), bytes.end()));
        fclose(file);
    } else {
        for (int v = 0; v < tc_vectors; ++v)
            inputs.push_back(std::vector<int>(tc_inputs[v], tc_inputs[v] + @IN_COUNT@));
    }
    int calls = (int)inputs.size();
    outputs.resize(calls);
    if (fifo) {
#ifdef TC_SIM_STREAMS
        tc_sim::scheduler scheduler(seed, stall);
        @STREAMS@
        scheduler.add("source", [&] { for (int i = 0; i < calls; ++i) feed(input, inputs[i]); });
        @STAGES@
        scheduler.add("sink", [&] { for (int i = 0; i < calls; ++i) drain(output, outputs[i]); });
        if (!scheduler.run())
            return 3;
#else
        printf("--fifo needs the simulation headers: compile with -DTC_SIM\n");
        return 2;
#endif
    } else {
        for (int i = 0; i < calls; ++i) {
            @IN_STREAM@ input("input");
            @OUT_STREAM@ output("output");
            feed(input, inputs[i]);
            @TOP@(input, output);
            drain(output, outputs[i]);
            if (!input.empty() || !output.empty()) {
                printf("words left in a stream\n");
                return 1;
            }
        }
    }
    if (out_path) {
        FILE* file = fopen(out_path, "wb");
        if (!file)
            return 2;
        for (int i = 0; i < calls; ++i)
            fwrite(outputs[i].data(), 4, outputs[i].size(), file);
        fclose(file);
        return 0;
    }
    int wrong = 0;
    for (int v = 0; v < calls; ++v)
        for (int i = 0; i < @OUT_COUNT@; ++i)
            if (outputs[v][i] != tc_expected[v][i] && ++wrong <= 5)
                printf("vector %d element %d: %d, expected %d\n", v, i, outputs[v][i], tc_expected[v][i]);
    printf("%s: %d of %d elements differ\n", wrong ? "FAIL" : "PASS", wrong, calls * @OUT_COUNT@);
    return wrong ? 1 : 0;
}
