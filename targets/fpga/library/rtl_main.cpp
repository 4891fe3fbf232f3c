// Feeds words to a Verilated module and takes its results, with random pauses on both sides.
// Arguments: IN OUT PAUSE_IN PAUSE_OUT SEED. Prints: cycles from the first word taken to the last result, and of every inference the cycle of its last result.
// Exit status: 0 done, 2 usage, 3 nothing moved for a long time.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "Vtc_top.h"

int main(int argc, char** argv) {
    if (argc != 6)
        return 2;
    FILE* file = fopen(argv[1], "rb");
    if (!file)
        return 2;
    std::vector<unsigned char> input, output;
    unsigned char chunk[4096];
    for (size_t n; (n = fread(chunk, 1, sizeof chunk, file)) > 0;)
        input.insert(input.end(), chunk, chunk + n);
    fclose(file);
    const size_t in_bytes = IN_BYTES, out_bytes = OUT_BYTES, calls = input.size() / IN_TOTAL, expected = calls * OUT_TOTAL;
    int pause_in = atoi(argv[3]), pause_out = atoi(argv[4]);
    unsigned state = atoi(argv[5]) * 2654435761u + 99u;
    auto random = [&] {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        return (int)(state % 100);
    };
    Vtc_top top;
    memset(&top.in_data, 0, sizeof top.in_data);
    top.in_valid = top.out_ready = 0;
    auto edge = [&] {
        top.clk = 1;
        top.eval();
        top.clk = 0;
        top.eval();
    };
    top.clk = 0;
    top.rst = 1;
    for (int i = 0; i < 4; ++i)
        edge();
    top.rst = 0;
    size_t sent = 0;
    long long cycle = 0, first = -1, quiet = 0;
    bool offering = false;
    std::vector<long long> ends;
    while (output.size() < expected) {
        if (!offering && sent < input.size() && random() >= pause_in)
            offering = true;  // once offered, a word stays until it is taken
        top.in_valid = offering;
        if (offering)
            memcpy(&top.in_data, &input[sent], in_bytes);
        top.out_ready = random() >= pause_out;
        top.eval();
        bool taken = top.in_valid && top.in_ready, given = top.out_valid && top.out_ready;
        if (given) {
            const unsigned char* bytes = (const unsigned char*)&top.out_data;
            output.insert(output.end(), bytes, bytes + out_bytes);
            if (output.size() % OUT_TOTAL == 0)
                ends.push_back(cycle);
        }
        if (taken) {
            if (first < 0)
                first = cycle;
            sent += in_bytes;
            offering = false;
        }
        quiet = taken || given ? 0 : quiet + 1;
        if (quiet > 1000000) {
            printf("HANG after %zu of %zu bytes\n", output.size(), expected);
            return 3;
        }
        edge();
        ++cycle;
    }
    file = fopen(argv[2], "wb");
    if (!file)
        return 2;
    fwrite(output.data(), 1, output.size(), file);
    fclose(file);
    printf("%lld", ends.empty() ? 0 : ends.back() - first + 1);
    for (long long end : ends)
        printf(" %lld", end - first);
    printf("\n");
    return 0;
}
