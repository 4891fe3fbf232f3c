// Matrix-vector stage: y[n] = result(bias[n] + sum of x[k] * w[n][k]), one row of x after the other, the arithmetic of tc_matvec in tc_hls.h.
// PE results and SIMD products a cycle; of every GROUP inputs NZ have a weight (dense: 1 of 1), whose place stands above its byte in the table.
// K / GROUP * NZ / SIMD steps per fold, N / PE folds per row, one step a cycle. A word of the input is taken in the first fold and kept for the others.
//
//   step -> table, row -> operands -> products -> sum over SIMD -> accumulators -> * multiplier -> shift -> clip -> out
//
// When the output is blocked everything stands still; when the input is late, empty steps run through.
module tc_mvau #(
    parameter K = 16, N = 16, PE = 1, SIMD = 1, NZ = 1, GROUP = 1, ENTRY = 8, ACC = 32, SHIFT = 1, ZERO = 0, LOW = 0, HIGH = 255, RAW = 0,
    parameter TABLE = "table.hex", BIAS = "bias.hex", MULTIPLIER = "multiplier.hex",
    parameter LANES = (SIMD >= NZ ? SIMD / NZ : 1) * GROUP,
    parameter BITS = RAW != 0 ? 32 : 8
) (
    input wire clk, input wire rst,
    input wire [LANES*8-1:0] in_data, input wire in_valid, output wire in_ready,
    output wire [PE*BITS-1:0] out_data, output wire out_valid, input wire out_ready
);
    localparam HOLD = SIMD >= NZ ? 1 : NZ / SIMD;
    localparam STEPS = K / GROUP * NZ / SIMD;
    localparam FOLDS = N / PE;
    localparam WORDS = K / LANES;
    localparam DEPTH = STEPS * FOLDS;
    localparam PLACE = ENTRY > 8 ? ENTRY - 8 : 1;

    localparam PCW = $clog2(DEPTH + 1), TW = $clog2(STEPS + 1), WW = $clog2(WORDS + 1), HW = $clog2(HOLD + 1), FW = $clog2(FOLDS + 1);

    // ---- the step
    reg [PCW-1:0] pc;
    reg [TW-1:0] pc_in_fold;
    reg [WW-1:0] word;
    reg [HW-1:0] hold;
    reg [FW-1:0] fold, fold1, fold2, fold3, fold4;
    wire go = !out_valid || out_ready;
    wire takes = fold == 0 && hold == 0;
    wire step = go && (!takes || in_valid);
    wire last = pc_in_fold == STEPS - 1;
    assign in_ready = go && takes;
    always @(posedge clk)
        if (rst) begin
            pc <= 0; pc_in_fold <= 0; word <= 0; hold <= 0; fold <= 0;
        end else if (step) begin
            pc <= pc == DEPTH - 1 ? 0 : pc + 1;
            pc_in_fold <= last ? 0 : pc_in_fold + 1;
            hold <= hold == HOLD - 1 ? 0 : hold + 1;
            if (hold == HOLD - 1) word <= word == WORDS - 1 ? 0 : word + 1;
            if (last) fold <= fold == FOLDS - 1 ? 0 : fold + 1;
        end

    // ---- table and row
    reg [PE*SIMD*ENTRY-1:0] entries;
    generate  // block RAM for more words than one LUT per bit holds
        if (DEPTH > 64) begin : block
            (* rom_style = "block" *) reg [PE*SIMD*ENTRY-1:0] rom [0:DEPTH-1];
            initial $readmemh(TABLE, rom);
            always @(posedge clk) if (go) entries <= rom[pc];
        end else begin : distributed
            reg [PE*SIMD*ENTRY-1:0] rom [0:DEPTH-1];
            initial $readmemh(TABLE, rom);
            always @(posedge clk) if (go) entries <= rom[pc];
        end
    endgenerate
    reg [LANES*8-1:0] row [0:WORDS-1];
    reg [LANES*8-1:0] kept, fresh;
    reg is_fresh;
    reg v1, v2, v3, v4, v5, first1, first2, first3, first4, last1, last2, last3, last4;
    wire [LANES*8-1:0] x = is_fresh ? fresh : kept;
    always @(posedge clk)
        if (go) begin
            kept <= row[word];
            fresh <= in_data;
            is_fresh <= takes;
            if (takes && in_valid) row[word] <= in_data;
            first1 <= pc_in_fold == 0; last1 <= last; fold1 <= fold;
            first2 <= first1; last2 <= last1; fold2 <= fold1;
            first3 <= first2; last3 <= last2; fold3 <= fold2;
            first4 <= first3; last4 <= last3; fold4 <= fold3;
        end
    always @(posedge clk)
        if (rst) begin v1 <= 0; v2 <= 0; v3 <= 0; v4 <= 0; v5 <= 0; end
        else if (go) begin v1 <= step; v2 <= v1; v3 <= v2; v4 <= v3; v5 <= v4 && last4; end

    // ---- products, sums, accumulators
    reg [PE*ACC-1:0] biases [0:FOLDS-1];
    initial $readmemh(BIAS, biases);
    reg [PE*ACC-1:0] bias4;
    always @(posedge clk) if (go) bias4 <= biases[fold3];
    wire [PE*ACC-1:0] acc5;
    genvar p, s;
    generate
        for (p = 0; p < PE; p = p + 1) begin : lane
            wire signed [ACC-1:0] total [0:SIMD];
            assign total[0] = 0;
            for (s = 0; s < SIMD; s = s + 1) begin : product
                wire [ENTRY-1:0] entry = entries[(p*SIMD+s)*ENTRY +: ENTRY];
                wire [PLACE-1:0] place;
                if (ENTRY > 8) begin : sparse
                    assign place = entry[ENTRY-1 -: PLACE];
                end else begin : dense
                    assign place = 0;
                end
                wire [GROUP*8-1:0] group = x[(SIMD >= NZ ? s / NZ : 0)*GROUP*8 +: GROUP*8];
                reg signed [8:0] a;
                reg signed [7:0] b;
                reg signed [16:0] m;
                always @(posedge clk)
                    if (go) begin
                        a <= {1'b0, group[{place, 3'b000} +: 8]};
                        b <= entry[7:0];
                        m <= a * b;
                    end
                assign total[s+1] = total[s] + m;
            end
            reg signed [ACC-1:0] sum, acc;
            wire signed [ACC-1:0] start = bias4[p*ACC +: ACC];
            always @(posedge clk)
                if (go) begin
                    sum <= total[SIMD];
                    if (v4) acc <= (first4 ? start : acc) + sum;
                end
            assign acc5[p*ACC +: ACC] = acc;
        end
    endgenerate

    // ---- the result
    generate
        if (RAW != 0) begin : raw
            reg v6;
            reg [PE*BITS-1:0] y;
            for (p = 0; p < PE; p = p + 1) begin : lane
                wire signed [ACC-1:0] acc = acc5[p*ACC +: ACC];
                wire signed [31:0] wide = acc;
                always @(posedge clk) if (go) y[p*32 +: 32] <= wide;
            end
            always @(posedge clk) if (rst) v6 <= 0; else if (go) v6 <= v5;
            assign out_data = y;
            assign out_valid = v6;
        end else begin : requantised
            reg [PE*17-1:0] multipliers [0:FOLDS-1];
            initial $readmemh(MULTIPLIER, multipliers);
            reg [PE*17-1:0] multiplier5;
            reg v6, v7, v8;
            reg [PE*BITS-1:0] y;
            always @(posedge clk) if (go) multiplier5 <= multipliers[fold4];
            for (p = 0; p < PE; p = p + 1) begin : lane
                wire signed [ACC-1:0] acc = acc5[p*ACC +: ACC];
                wire signed [17:0] multiplier = {1'b0, multiplier5[p*17 +: 17]};
                reg signed [ACC+17:0] scaled;
                reg signed [ACC+17:0] level;
                wire signed [ACC+18:0] rounded = scaled + (52'sd1 <<< (SHIFT - 1));
                always @(posedge clk)
                    if (go) begin
                        scaled <= acc * multiplier;
                        level <= (rounded >>> SHIFT) + ZERO;
                        y[p*8 +: 8] <= level < LOW ? LOW : level > HIGH ? HIGH : level[7:0];
                    end
            end
            always @(posedge clk)
                if (rst) begin v6 <= 0; v7 <= 0; v8 <= 0; end
                else if (go) begin v6 <= v5; v7 <= v6; v8 <= v7; end
            assign out_data = y;
            assign out_valid = v8;
        end
    endgenerate
endmodule
