// A stream of DEPTH words of W bits.
module tc_fifo #(parameter W = 8, DEPTH = 16) (
    input wire clk, input wire rst,
    input wire [W-1:0] in_data, input wire in_valid, output wire in_ready,
    output wire [W-1:0] out_data, output wire out_valid, input wire out_ready
);
    localparam A = DEPTH > 1 ? $clog2(DEPTH) : 1;
    reg [W-1:0] words [0:DEPTH-1];
    reg [A-1:0] head, tail;
    reg [A:0] count;
    wire push = in_valid && in_ready, pop = out_valid && out_ready;
    assign in_ready = count != DEPTH;
    assign out_valid = count != 0;
    assign out_data = words[tail];
    always @(posedge clk) begin
        if (push) words[head] <= in_data;
        if (rst) begin
            head <= 0; tail <= 0; count <= 0;
        end else begin
            if (push) head <= head == DEPTH - 1 ? 0 : head + 1;
            if (pop) tail <= tail == DEPTH - 1 ? 0 : tail + 1;
            count <= count + push - pop;
        end
    end
endmodule

// Words of LI elements of W bits to words of LO; one of the two divides the other.
module tc_convert #(parameter W = 8, LI = 1, LO = 1) (
    input wire clk, input wire rst,
    input wire [LI*W-1:0] in_data, input wire in_valid, output wire in_ready,
    output wire [LO*W-1:0] out_data, output wire out_valid, input wire out_ready
);
    localparam R = LO > LI ? LO / LI : LI / LO;
    localparam PW = R > 1 ? $clog2(R) : 1;
    reg [PW-1:0] place;
    wire end_of_word = place == R - 1;
    generate
        if (LO > LI) begin : wider
            reg [(R-1)*LI*W-1:0] early;
            assign in_ready = !end_of_word || out_ready;
            assign out_valid = in_valid && end_of_word;
            assign out_data = {in_data, early};
            always @(posedge clk)
                if (rst) place <= 0;
                else if (in_valid && in_ready) begin
                    place <= end_of_word ? 0 : place + 1;
                    if (!end_of_word) early[place*LI*W +: LI*W] <= in_data;
                end
        end else begin : narrower
            assign in_ready = out_ready && end_of_word;
            assign out_valid = in_valid;
            assign out_data = in_data[place*LO*W +: LO*W];
            always @(posedge clk)
                if (rst) place <= 0;
                else if (out_valid && out_ready) place <= end_of_word ? 0 : place + 1;
        end
    endgenerate
endmodule
