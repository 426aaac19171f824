// The operators as MindSpore's custom operators of kind "aot" call them: addresses, ranks, shapes and types of the
// inputs, then of the outputs. All is float32 but indices, which are int32, and weights W and right factors of
// products, which may be float16 or bfloat16. What each computes stands beside its function in rows.h, product.h and
// attention.h.

#include <memory>
#include <mutex>
#include <new>
#include <optional>

#include "attention.h"
#include "bfloat16.h"
#include "dropout.h"
#include "layer.h"
#include "optimizer.h"

using namespace lora_ms;

namespace {

// An input or output.
struct Tensor {
    void *data;
    int ndim;
    const int64_t *shape;
    const char *type;  // its name

    float *floats() const { return static_cast<float *>(data); }
    const int32_t *ints() const { return static_cast<const int32_t *>(data); }
    const uint8_t *bytes() const { return static_cast<const uint8_t *>(data); }
    float number() const { return *floats(); }  // of a scalar
    long size(int axis) const { return shape[axis]; }
    bool is(const char *name) const { return std::strcmp(type, name) == 0; }
    Matrix matrix() const {
        return {data, size(ndim - 1), 1, is("float16") ? Type::FLOAT16 : is("bfloat16") ? Type::BFLOAT16 : Type::FLOAT32};
    }
    long numbers() const {
        long n = 1;
        for (int axis = 0; axis < ndim; axis++) n *= shape[axis];
        return n;
    }
};

// The tensors of a call, handed out in their order: inputs, then outputs.
class Arguments {
  public:
    Arguments(int count, void **data, int *ndims, int64_t **shapes, const char **types)
        : count_(count), data_(data), ndims_(ndims), shapes_(shapes), types_(types) {}

    Tensor next() { return tensor(at_++); }

    // The last output.
    Tensor last() const { return tensor(count_ - 1); }

    // Output i of `outputs`.
    Tensor output(int outputs, int i) const { return tensor(count_ - outputs + i); }

    // How many tensors are left before the last `outputs`.
    int inputs_left(int outputs) const { return count_ - outputs - at_; }

    // rows [t], columns [n] and [rate, 1 / (1 - rate)]: inputs that an operator with dropout has besides.
    Dropout dropout() {
        const Tensor rows = next(), columns = next(), rate = next();
        return {rows.floats(), columns.floats(), rate.floats()[0], rate.floats()[1]};
    }

    // The same where the call has these inputs, nothing where it has none.
    std::optional<Dropout> optional_dropout(int outputs) {
        if (inputs_left(outputs) == 0) return std::nullopt;
        return dropout();
    }

  private:
    Tensor tensor(int i) const { return {data_[i], ndims_[i], shapes_[i], types_[i]}; }

    int count_, at_ = 0;
    void **data_;
    int *ndims_;
    int64_t **shapes_;
    const char **types_;
};

enum Kind { TIMES_TRANSPOSED, TIMES, TRANSPOSED_TIMES };
// A weight [out, in] as operators take it: a tensor of any type; or of four bits, its codes by rows, two in a byte, with
// a scale, or with a scale (float16) and a zero, for each group of neighbours.
Matrix next_weight(Type type, Arguments &arguments, long out) {
    const Tensor weight = arguments.next();
    if (type != Type::NF4 && type != Type::INT4) return weight.matrix();
    const Tensor scales = arguments.next();
    const uint8_t *zeros = type == Type::INT4 ? arguments.next().bytes() : nullptr;
    const long numbers = 2 * weight.numbers();
    const long group = type == Type::NF4 ? Nf4::BLOCK : numbers / scales.numbers();
    return {weight.data, numbers / out, 1, type, scales.data, zeros, group};
}

// Inputs a1, b1, a2, b2, … and, where their number is odd, what the products are added to: [m, n], or [n], to each row.
// b1 is a weight of `type`.
int products(Kind kind, Arguments arguments, Multiply multiply = product, Type type = Type::FLOAT32) {
    std::vector<Term> terms;
    const long out = kind == TIMES ? 0 : arguments.last().size(1);
    while (arguments.inputs_left(1) >= 2) {
        const Tensor left = arguments.next();
        const Matrix a = kind == TRANSPOSED_TIMES ? left.matrix().transposed() : left.matrix();
        const long depth = left.size(kind == TRANSPOSED_TIMES ? 0 : 1);
        const Matrix right = next_weight(terms.empty() ? type : Type::FLOAT32, arguments, kind == TIMES ? depth : out);
        terms.push_back({a, kind == TIMES_TRANSPOSED ? right.transposed() : right, depth});
    }
    const float *start = nullptr;
    bool start_of_each_row = false;
    if (arguments.inputs_left(1)) {
        const Tensor given = arguments.next();
        start = given.floats();
        start_of_each_row = given.ndim == 2;
    }
    const Tensor c = arguments.next();
    multiply(terms, c.size(0), c.size(1), start, start_of_each_row ? c.size(1) : 0, c.floats());
    return 0;
}

// How many rows of x [t, n] there are without those at the end that are zero, as of padding.
long real_rows(const Tensor &x) { return without_zero_end({{x.matrix(), {}, x.size(1)}}, x.size(0)); }

// The rows of y [t, n] from `rows` on are zero.
void end_with_zeros(const Tensor &y, long rows) {
    std::fill_n(y.floats() + rows * y.size(1), (y.size(0) - rows) * y.size(1), 0.0f);
}

// q [t, n_h * d]; k, v [t, n_kv * d]; cos, sin [t * n, d], of whose n equal rows for a token one is read; first [b, s]
Attention attention_of(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor first) {
    const long dim = cos.size(1), tokens = q.size(0);
    Attention a;
    a.q = q.floats(), a.k = k.floats(), a.v = v.floats();
    a.cos = cos.floats(), a.sin = sin.floats(), a.first = first.ints();
    a.batch = first.size(0), a.seq = first.size(1);
    a.heads = q.size(1) / dim, a.kv_heads = k.size(1) / dim, a.dim = dim;
    a.table_row = cos.size(0) / tokens * dim;
    return a;
}

// A [places, rank, in], B [places, rank, out], choice [lines]
RowUpdates row_updates_of(const Tensor &a, const Tensor &b, const Tensor &choice) {
    return {a.floats(), b.floats(), choice.ints(), a.size(0), choice.size(0), a.size(1)};
}

// Of each line, the slot of the first of its new tokens: `rows` [b * n_kv * s] of the cache are theirs.
std::vector<long> slots_of(const Attention &a, const Tensor &rows, const Tensor &begins) {
    std::vector<long> slots(a.batch);
    for (long line = 0; line < a.batch; line++)
        slots[line] = rows.ints()[line * a.kv_heads * a.seq] - begins.ints()[line * a.kv_heads];
    return slots;
}

// A vector of any type, in float32.
Numbers floats_of(const Tensor &vector) {
    const long n = vector.numbers();
    Numbers found(new float[n]);
    with_numbers(vector.matrix(), [&](auto from) {
        for (long i = 0; i < n; i += LANES) store_up_to(found.get() + i, load_up_to(from + i, n - i), n - i);
    });
    return found;
}

// What a linear layer adds to x W^T before its bias: nothing, an update by A, B and scaling, or one for each line.
enum Update { NO_UPDATE, LOW_RANK, OF_LINES };

// Layers as operators take them; see Operators.cached_layers in operators.py.
class Layers {
  public:
    // x, parts, eps, cos, sin and, after `others` more tensors, `first` of each window; then the layers' parameters.
    Layers(const Arguments &arguments, Multiply multiply, int others) : arguments_(arguments), multiply_(multiply) {
        x_ = next_tensor();
        const Tensor parts = next_tensor();
        part_ = parts.ints();
        count_ = *part_++;
        int windows = 0;
        for (long i = 0; i < count_; i++) windows = std::max(windows, part_[i * PARTS] + 1);
        eps_ = next_tensor().number();
        cos_ = next_tensor(), sin_ = next_tensor();
        while (others-- > 0) others_.push_back(next_tensor());
        while (windows-- > 0) first_.push_back(next_tensor());
        ones_.assign(cos_.size(1), 1.0f), zeros_.assign(cos_.size(1), 0.0f);
    }

    int count() const { return count_; }
    const Tensor &x() const { return x_; }
    const Tensor &other(int i) const { return others_[i]; }
    Tensor next_tensor() { return arguments_.next(); }

    // The next one. Its numbers of dropout are in `draws` [places, n], whose columns begin at the part's last number.
    Layer next(const Tensor *draws = nullptr, const float *rate = nullptr) {
        const long hidden = x_.size(1), tokens = x_.size(0);
        const int32_t *part = part_;
        part_ += PARTS;
        Layer layer;
        layer.multiply = multiply_, layer.eps = eps_;
        Attention &attention = layer.attention;
        const Tensor &first = first_[*part++];
        attention.first = first.ints(), attention.batch = first.size(0), attention.seq = first.size(1);
        attention.dim = cos_.size(1);
        const bool rotates = *part++;
        attention.cos = rotates ? cos_.floats() : ones_.data(), attention.sin = rotates ? sin_.floats() : zeros_.data();
        attention.table_row = rotates ? cos_.size(0) / tokens * attention.dim : 0;
        layer.input_norm = floats_of(next_tensor()), layer.post_norm = floats_of(next_tensor());
        if (*part++) layer.q_norm = floats_of(next_tensor()), layer.k_norm = floats_of(next_tensor());
        const auto linear = [&](long in) {
            Linear found = next_linear(in, part[0], part[1]);
            if (draws && part[2] >= 0) {
                const float *row = draws->floats() + part[2] * draws->size(1);
                found.dropout = Dropout{row, row + part[3], rate[0], rate[1]};
            }
            part += 4;
            rate += rate ? 2 : 0;
            return found;
        };
        layer.q = linear(hidden), layer.k = linear(hidden), layer.v = linear(hidden), layer.o = linear(layer.q.out);
        layer.gate = linear(hidden), layer.up = linear(hidden), layer.down = linear(layer.gate.out);
        attention.heads = layer.q.out / attention.dim, attention.kv_heads = layer.k.out / attention.dim;
        return layer;
    }

  private:
    static constexpr long PARTS = 3 + 7 * 4;  // numbers of a layer

    // A linear layer for inputs of `in` numbers: the weight [out, in], of any type; what its update consists of; its bias.
    //
    // A weight of four bits is codes with, of NF4, absmax, in float32 or as bytes with their own codes, absmax and
    // offset; and of INT4 scales and zeros.
    Linear next_linear(long in, int update, bool has_bias) {
        const Tensor weight = next_tensor();
        Linear linear;
        linear.in = in;
        if (weight.is("uint8")) {
            const Tensor scales = next_tensor();
            const long numbers = 2 * weight.numbers();
            linear.out = numbers / in;
            if (scales.is("float16")) {
                const uint8_t *zeros = next_tensor().bytes();
                linear.weight = {weight.data, in, 1, Type::INT4, scales.data, zeros, numbers / scales.numbers()};
            } else {
                linear.weight = {weight.data, in, 1, Type::NF4, scales.data, nullptr, Nf4::BLOCK};
                if (scales.is("uint8")) {
                    const Tensor table = next_tensor(), factors = next_tensor(), offset = next_tensor();
                    linear.weight.nested = {scales.bytes(), table.floats(), factors.floats(), offset.number()};
                }
            }
        } else {
            linear.out = weight.size(0);
            linear.weight = weight.matrix();
        }
        if (update == LOW_RANK) {
            const Tensor a = next_tensor(), b = next_tensor();
            linear.rank = a.size(0), linear.a = a.matrix(), linear.b = b.matrix();
            linear.scaling = next_tensor().number();
        } else if (update == OF_LINES) {
            const Tensor a = next_tensor(), b = next_tensor();
            linear.lines = row_updates_of(a, b, next_tensor());
        }
        if (has_bias) linear.bias = floats_of(next_tensor());
        return linear;
    }

    Arguments arguments_;
    Multiply multiply_;
    Tensor x_, cos_, sin_;
    std::vector<Tensor> others_, first_;
    const int32_t *part_;
    int count_;
    float eps_;
    std::vector<float> ones_, zeros_;  // tables of a layer that does not rotate
};

// x, parts, eps, cos, sin, rows, begins, first …, of each layer its parameters, keys and values -> like x
int layers_on_new_tokens(Arguments arguments, Multiply multiply) {
    Layers layers(arguments, multiply, 2);
    const Tensor &x = layers.x();
    const long tokens = x.size(0);
    const float *from = x.floats();
    float *to = arguments.last().floats();
    Numbers memory;
    for (long i = 0; i < layers.count(); i++, from = to) {
        const Layer layer = layers.next();
        for (const Linear *each : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
            if (!each->lines.exist()) return 1;
        const Tensor keys = layers.next_tensor(), values = layers.next_tensor();
        const long between = layer.between_numbers();
        if (!memory) memory.reset(new float[tokens * (between + layer.spare_numbers())]);
        const auto attend = [&](const Attention &attention, float *mixed) {
            const std::vector<long> slots = slots_of(attention, layers.other(0), layers.other(1));
            lora_ms::cached_attention(attention, keys.floats(), values.floats(), layers.other(1).ints(), slots, mixed);
        };
        layer(from, tokens, layer.between(memory.get(), tokens), memory.get() + tokens * between, attend, to);
    }
    return 0;
}

// x [t, h], rows [n], eps, the last norm's weight [h], the head [v, h] -> logits [n, v] of what follows these tokens
int logits_of_rows(Arguments arguments, Multiply multiply) {
    const Tensor x = arguments.next(), rows = arguments.next(), eps = arguments.next();
    const Numbers norm = floats_of(arguments.next());
    const Tensor head = arguments.next(), logits = arguments.next();
    const long hidden = x.size(1), count = rows.numbers();
    const Numbers picked(new float[count * hidden]), normed(new float[count * hidden]);
    for (long i = 0; i < count; i++) std::copy_n(x.floats() + rows.ints()[i] * hidden, hidden, picked.get() + i * hidden);
    lora_ms::rms_norm(picked.get(), norm.get(), eps.number(), count, hidden, normed.get());
    multiply({{{normed.get(), hidden, 1}, head.matrix().transposed(), hidden}}, count, head.size(0), nullptr, 0,
             logits.floats());
    return 0;
}

constexpr long RATES = 2 * 7;  // of a layer: each one's rate of dropout, and 1 / (1 - rate)

// Memory that stays for the next call: to hand it out anew costs the system a thirtieth of a training step.
class Room {
  public:
    float *of(long numbers) {
        if (numbers > size_ || numbers < size_ / 2) {
            memory_.reset();  // first: both need not be there at once
            size_ = 0;
            memory_.reset(new float[numbers]);
            size_ = numbers;
        }
        return memory_.get();
    }
    float *get() const { return memory_.get(); }

  private:
    Numbers memory_;
    long size_ = 0;
};

// What layers keep for their gradient, which follows before other layers keep something: of each its Between and then,
// but of the last one, its result. Here, and not in MindSpore's tensors, as it holds on to the last outputs of a graph,
// and to the last inputs, until its next call: all would be there two or three times.
struct Kept {
    std::mutex mutex;  // of a call
    std::vector<Room> layers;
    Room spare, spare_back;
    int owner = -1;   // the number of whose layers it is; -1 where the gradient has been found
    long tokens = 0;  // of that call

    static Kept &shared() {
        static Kept *kept = new Kept();
        return *kept;
    }
};

// x, parts, eps, cos, sin, draws, rates, number, first …, parameters -> like x.
int layers_in_training(const Arguments &arguments, Multiply multiply, bool keeps) {
    Layers layers(arguments, multiply, 3);
    const Tensor &x = layers.x();
    const long tokens = x.size(0), hidden = x.size(1);
    float *result = arguments.last().floats();
    const float *from = x.floats();
    Kept &kept = Kept::shared();
    std::lock_guard<std::mutex> lock(kept.mutex);
    if (keeps) kept.owner = -1, kept.layers.resize(layers.count());
    for (int i = 0; i < layers.count(); i++) {
        const Layer layer = layers.next(&layers.other(0), layers.other(1).floats() + i * RATES);
        const long between = layer.between_numbers();
        float *spare = kept.spare.of(tokens * (layer.spare_numbers() + (keeps ? 0 : between)));
        float *own = keeps ? kept.layers[i].of(tokens * (between + hidden)) : spare + tokens * layer.spare_numbers();
        const Between all = layer.between(own, tokens);
        float *to = keeps && i + 1 < layers.count() ? own + tokens * between : result;
        const auto attend = [&](const Attention &attention, float *mixed) {
            lora_ms::attention(attention, mixed, all.sums);
        };
        layer(from, tokens, all, spare, attend, to);
        from = to;
    }
    if (keeps) kept.owner = *layers.other(2).ints(), kept.tokens = tokens;
    return 0;
}

// x, parts, eps, cos, sin, draws, rates, number, d_y, wanted, first …, parameters -> d_x like x, and the gradients of all
// factors from the lowest layer on that has one. wanted: the first half-layer that needs a gradient, and whether x does,
// or d_x is zero.
int gradient_of_layers(const Arguments &arguments, Multiply multiply) {
    std::vector<Layers> layers{Layers(arguments, multiply, 5)};  // each stands before the layer of its number
    const Tensor x = layers[0].x();
    const int32_t *wanted = layers[0].other(4).ints();
    const long tokens = x.size(0), hidden = x.size(1);
    const int count = layers[0].count(), lowest = wanted[0] / 2;
    Kept &kept = Kept::shared();
    std::lock_guard<std::mutex> lock(kept.mutex);
    if (std::exchange(kept.owner, -1) != *layers[0].other(2).ints() || kept.tokens != tokens) return 1;
    float *d_x = arguments.output(2, 0).floats(), *d_factors = arguments.last().floats();
    std::copy_n(layers[0].other(3).floats(), tokens * hidden, d_x);
    long between = 0;
    for (int i = 0; i < count; i++) {
        layers.push_back(layers.back());
        const Layer layer = layers.back().next();
        between = tokens * layer.between_numbers();
        if (i >= lowest) d_factors += layer.factor_numbers();
    }
    for (int i = count; i-- > lowest;) {
        const Layer layer = layers[i].next(&layers[i].other(0), layers[i].other(1).floats() + i * RATES);
        const float *input = i == 0 ? x.floats() : kept.layers[i - 1].get() + between;
        const Between all = layer.between(kept.layers[i].get(), tokens);
        const bool last = i == lowest, feed_alone = last && wanted[0] % 2 == 1;
        d_factors -= layer.factor_numbers();
        float *to = !last || wanted[1] ? d_x : nullptr;
        float *spare = kept.spare_back.of(tokens * layer.spare_numbers_back());
        layer.backward(input, all, d_x, tokens, feed_alone, spare, to, d_factors);
    }
    if (!wanted[1]) std::fill_n(d_x, tokens * hidden, 0.0f);
    return 0;
}

// rate and decay [n] or [], and the numbers of Step [7]
StepInputs step_inputs(const Tensor &old, const Tensor &grad, const Tensor &rate, const Tensor &decay) {
    const long n = old.numbers();
    return {old.floats(), grad.floats(), {rate.floats(), rate.numbers() == n}, {decay.floats(), decay.numbers() == n}};
}

Step step_of(const Tensor &numbers) {
    Step step;
    static_assert(sizeof step == 7 * sizeof(float));
    std::memcpy(&step, numbers.floats(), sizeof step);
    return step;
}

}  // namespace

#define OPERATOR(name) \
    extern "C" int name(int count, void **data, int *ndims, int64_t **shapes, const char **types, void *, void *)
#define ARGUMENTS Arguments(count, data, ndims, shapes, types)

extern "C" void set_threads(int count) { Threads::shared().set_count(count); }

// Whether the operators named …_bfloat16 round to bfloat16; without the instructions for it they are as the others.
extern "C" int rounds_to_bfloat16() { return ROUNDS_TO_BFLOAT16; }

// a b^T + …: a [m, k], b [n, k]
OPERATOR(times_transposed) { return products(TIMES_TRANSPOSED, ARGUMENTS); }
OPERATOR(nf4_times_transposed) { return products(TIMES_TRANSPOSED, ARGUMENTS, product, Type::NF4); }
OPERATOR(int4_times_transposed) { return products(TIMES_TRANSPOSED, ARGUMENTS, product, Type::INT4); }

// a b + …: a [m, k], b [k, n]
OPERATOR(times) { return products(TIMES, ARGUMENTS); }
OPERATOR(nf4_times) { return products(TIMES, ARGUMENTS, product, Type::NF4); }
OPERATOR(int4_times) { return products(TIMES, ARGUMENTS, product, Type::INT4); }

// The same with a and b rounded to bfloat16, but not what is added to their product.
OPERATOR(times_transposed_bfloat16) { return products(TIMES_TRANSPOSED, ARGUMENTS, product_bfloat16); }
OPERATOR(times_bfloat16) { return products(TIMES, ARGUMENTS, product_bfloat16); }
OPERATOR(nf4_times_transposed_bfloat16) {
    return products(TIMES_TRANSPOSED, ARGUMENTS, product_bfloat16, Type::NF4);
}
OPERATOR(nf4_times_bfloat16) { return products(TIMES, ARGUMENTS, product_bfloat16, Type::NF4); }
OPERATOR(int4_times_transposed_bfloat16) {
    return products(TIMES_TRANSPOSED, ARGUMENTS, product_bfloat16, Type::INT4);
}
OPERATOR(int4_times_bfloat16) { return products(TIMES, ARGUMENTS, product_bfloat16, Type::INT4); }

// a^T b + …: a [k, m], b [k, n]
OPERATOR(transposed_times) { return products(TRANSPOSED_TIMES, ARGUMENTS); }

// x [t, in], A [rank, in], scaling [] -> low = scaling x A^T [t, rank]. With rows [t], columns [in], [rate, 1 / (1 - rate)]
// besides, x is dropped out.
OPERATOR(low_rank_input) {
    Arguments arguments = ARGUMENTS;
    const Tensor x = arguments.next(), a = arguments.next(), scaling = arguments.next();
    const std::optional<Dropout> dropout = arguments.optional_dropout(1);
    const Tensor low = arguments.next();
    const long tokens = x.size(0), in = x.size(1), rank = a.size(0);
    Numbers memory;
    low_product(dropped(dropout, x.matrix(), tokens, in, memory), a.matrix().transposed(), tokens, in, rank,
                scaling.number(), low.floats());
    return 0;
}

// Of x W^T + low B^T: d_y [t, out], x, low, B, scaling -> d_low = scaling d_y B [t, rank], d_A = d_low^T x,
// d_B = d_y^T low; with rows, columns and rate as there.
OPERATOR(adapted_product_gradient) {
    Arguments arguments = ARGUMENTS;
    const Tensor d_y = arguments.next(), x = arguments.next(), low = arguments.next(), b = arguments.next();
    const Tensor scaling = arguments.next();
    const std::optional<Dropout> dropout = arguments.optional_dropout(3);
    const Tensor d_low = arguments.next(), d_a = arguments.next(), d_b = arguments.next();
    factor_gradients(d_y.matrix(), x.matrix(), low.matrix(), b.matrix(), scaling.number(), dropout, d_y.size(0),
                     x.size(1), d_y.size(1), low.size(1), d_low.floats(), d_a.floats(), d_b.floats());
    return 0;
}

// d_y, W, d_low, A, rows, columns, [rate, 1 / (1 - rate)] -> d_x = d_y W + dropout(d_low A)
int input_gradient(Arguments arguments, Multiply multiply, Type type = Type::FLOAT32) {
    const Tensor d_y = arguments.next();
    const long tokens = d_y.size(0), out = d_y.size(1);
    const Matrix weight = next_weight(type, arguments, out);
    const Tensor d_low = arguments.next(), a = arguments.next();
    const Dropout dropout = arguments.dropout();
    const Tensor d_x = arguments.next();
    dropped_gradient(d_y.matrix(), weight, d_low.matrix(), a.matrix(), dropout, tokens, d_x.size(1), out, d_low.size(1),
                     multiply, d_x.floats());
    return 0;
}

OPERATOR(dropped_input_gradient) { return input_gradient(ARGUMENTS, product); }
OPERATOR(nf4_dropped_input_gradient) { return input_gradient(ARGUMENTS, product, Type::NF4); }
OPERATOR(int4_dropped_input_gradient) { return input_gradient(ARGUMENTS, product, Type::INT4); }
OPERATOR(dropped_input_gradient_bfloat16) { return input_gradient(ARGUMENTS, product_bfloat16); }
OPERATOR(nf4_dropped_input_gradient_bfloat16) { return input_gradient(ARGUMENTS, product_bfloat16, Type::NF4); }
OPERATOR(int4_dropped_input_gradient_bfloat16) { return input_gradient(ARGUMENTS, product_bfloat16, Type::INT4); }

// y [t, out], x [t, in], A [places, rank, in], B [places, rank, out], choice [lines] int32 -> y + x A^T B with the A and
// B of each token's line.
OPERATOR(row_updates) {
    Arguments arguments = ARGUMENTS;
    const Tensor y = arguments.next(), x = arguments.next(), a = arguments.next(), b = arguments.next();
    const Tensor choice = arguments.next(), sum = arguments.next();
    const RowUpdates updates = row_updates_of(a, b, choice);
    if (!updates.exist()) return 1;
    updates(y.floats(), x.floats(), x.size(0), x.size(1), y.size(1), sum.floats());
    return 0;
}

// ids [t] int32, weight [v, h] of any type -> its rows in float32 [t, h]
OPERATOR(embedding) {
    Arguments arguments = ARGUMENTS;
    const Tensor ids = arguments.next(), weight = arguments.next(), rows = arguments.next();
    const long hidden = weight.size(1);
    for (long i = 0; i < ids.size(0); i++)
        if (ids.ints()[i] < 0 || ids.ints()[i] >= weight.size(0)) return 1;  // MindSpore stops with the operator's name
    for (long i = 0; i < ids.size(0); i++)
        with_numbers(weight.matrix().from(ids.ints()[i], 0), [&](auto from) {
            float *to = rows.floats() + i * hidden;
            for (long j = 0; j < hidden; j += LANES) store_up_to(to + j, load_up_to(from + j, hidden - j), hidden - j);
        });
    return 0;
}

// x [t, n], weight [n], eps [1] -> y [t, n]
OPERATOR(rms_norm) {
    Arguments arguments = ARGUMENTS;
    const Tensor x = arguments.next(), weight = arguments.next(), eps = arguments.next(), y = arguments.next();
    const long rows = real_rows(x);
    lora_ms::rms_norm(x.floats(), weight.floats(), eps.number(), rows, x.size(1), y.floats());
    end_with_zeros(y, rows);
    return 0;
}

// x [t, n], weight [n], eps [1], d_y [t, n] -> d_x [t, n]
OPERATOR(rms_norm_gradient) {
    Arguments arguments = ARGUMENTS;
    const Tensor x = arguments.next(), weight = arguments.next(), eps = arguments.next(), d_y = arguments.next();
    const Tensor d_x = arguments.next();
    const long rows = real_rows(d_y);
    lora_ms::rms_norm_gradient(x.floats(), weight.floats(), eps.number(), d_y.floats(), rows, x.size(1), d_x.floats());
    end_with_zeros(d_x, rows);
    return 0;
}

// x [t, n], eps [1], d_y [t, n] -> d_weight [n]
OPERATOR(rms_norm_weight_gradient) {
    Arguments arguments = ARGUMENTS;
    const Tensor x = arguments.next(), eps = arguments.next(), d_y = arguments.next(), d_weight = arguments.next();
    lora_ms::rms_norm_weight_gradient(x.floats(), eps.number(), d_y.floats(), x.size(0), x.size(1), d_weight.floats());
    return 0;
}

// gate, up -> y, all [t, n]
OPERATOR(gated_silu) {
    Arguments arguments = ARGUMENTS;
    const Tensor gate = arguments.next(), up = arguments.next(), y = arguments.next();
    const long rows = real_rows(gate);
    lora_ms::gated_silu(gate.floats(), up.floats(), rows * gate.size(1), y.floats());
    end_with_zeros(y, rows);
    return 0;
}

// gate, up, d_y -> d_gate, d_up, all [t, n]
OPERATOR(gated_silu_gradient) {
    Arguments arguments = ARGUMENTS;
    const Tensor gate = arguments.next(), up = arguments.next(), d_y = arguments.next();
    const Tensor d_gate = arguments.next(), d_up = arguments.next();
    const long rows = real_rows(d_y);
    lora_ms::gated_silu_gradient(gate.floats(), up.floats(), d_y.floats(), rows * gate.size(1), d_gate.floats(),
                                 d_up.floats());
    end_with_zeros(d_gate, rows);
    end_with_zeros(d_up, rows);
    return 0;
}

// logits [c, v], targets [c] -> loss [c], right [c], d_logits [c, v]
OPERATOR(cross_entropy) {
    Arguments arguments = ARGUMENTS;
    const Tensor logits = arguments.next(), targets = arguments.next();
    const Tensor loss = arguments.next(), right = arguments.next(), d_logits = arguments.next();
    lora_ms::cross_entropy(logits.floats(), targets.ints(), logits.size(0), logits.size(1), loss.floats(),
                           right.floats(), d_logits.floats());
    return 0;
}

// old, grad, exp_avg and exp_avg_sq, which are written, [n], rate, decay, step -> old anew
OPERATOR(adamw) {
    Arguments arguments = ARGUMENTS;
    const Tensor old = arguments.next(), grad = arguments.next();
    const Tensor exp_avg = arguments.next(), exp_avg_sq = arguments.next();
    const Tensor rate = arguments.next(), decay = arguments.next(), step = arguments.next();
    lora_ms::adamw(step_inputs(old, grad, rate, decay), step_of(step), old.numbers(), exp_avg.floats(),
                   exp_avg_sq.floats(), arguments.last().floats());
    return 0;
}

// old, grad [n]; codes and factors of both moments, which are written; tables, rate, decay, step -> old anew
OPERATOR(adamw_8bit) {
    Arguments arguments = ARGUMENTS;
    const Tensor old = arguments.next(), grad = arguments.next();
    const Tensor exp_avg = arguments.next(), exp_avg_factors = arguments.next();
    const Tensor exp_avg_sq = arguments.next(), exp_avg_sq_factors = arguments.next();
    const Tensor tables = arguments.next();
    const Tensor rate = arguments.next(), decay = arguments.next(), step = arguments.next();
    static_assert(sizeof(Tables) == 2 * (256 + 255) * sizeof(float));
    lora_ms::adamw_8bit(step_inputs(old, grad, rate, decay), step_of(step), old.numbers(),
                        *static_cast<const Tables *>(tables.data),
                        {static_cast<uint8_t *>(exp_avg.data), exp_avg_factors.floats()},
                        {static_cast<uint8_t *>(exp_avg_sq.data), exp_avg_sq_factors.floats()},
                        arguments.last().floats());
    return 0;
}

// q, k, v, cos, sin, first -> out like q, log_sum [t, n_h]
OPERATOR(attention) {
    Arguments arguments = ARGUMENTS;
    const Tensor q = arguments.next(), k = arguments.next(), v = arguments.next();
    const Tensor cos = arguments.next(), sin = arguments.next(), first = arguments.next();
    const Tensor out = arguments.next(), log_sum = arguments.next();
    lora_ms::attention(attention_of(q, k, v, cos, sin, first), out.floats(), log_sum.floats());
    return 0;
}

// q, k, v, cos, sin, first, out, log_sum, d_out -> d_q, d_k, d_v
OPERATOR(attention_gradient) {
    Arguments arguments = ARGUMENTS;
    const Tensor q = arguments.next(), k = arguments.next(), v = arguments.next();
    const Tensor cos = arguments.next(), sin = arguments.next(), first = arguments.next();
    const Tensor out = arguments.next(), log_sum = arguments.next(), d_out = arguments.next();
    const Tensor d_q = arguments.next(), d_k = arguments.next(), d_v = arguments.next();
    lora_ms::attention_gradient(attention_of(q, k, v, cos, sin, first), out.floats(), log_sum.floats(), d_out.floats(),
                                d_q.floats(), d_k.floats(), d_v.floats());
    return 0;
}

// q [b * s, n_h * d], k and v [b * s, n_kv * d] of new tokens, a cache's keys and values [lines * n_kv * length, d], which
// are written, cos, sin [b * s * n_kv, d], first [b, s], rows of the cache [b * n_kv * s] that the new tokens take, and
// where their heads begin [b * n_kv] -> like q
OPERATOR(cached_attention) {
    Arguments arguments = ARGUMENTS;
    const Tensor q = arguments.next(), k = arguments.next(), v = arguments.next();
    const Tensor keys = arguments.next(), values = arguments.next();
    const Tensor cos = arguments.next(), sin = arguments.next(), first = arguments.next();
    const Tensor rows = arguments.next(), begins = arguments.next(), out = arguments.next();
    const Attention a = attention_of(q, k, v, cos, sin, first);
    lora_ms::cached_attention(a, keys.floats(), values.floats(), begins.ints(), slots_of(a, rows, begins), out.floats());
    return 0;
}

// Layers of a decoder on new tokens, and in training. Python calls these itself, and no exception may reach it.
constexpr int OUT_OF_MEMORY = 2;  // of a call's result; 1: the inputs do not fit together

template <class Compute>
int guarded(Compute compute) {
    try {
        return compute();
    } catch (const std::bad_alloc &) {
        return OUT_OF_MEMORY;
    }
}

OPERATOR(cached_layers) {
    return guarded([&] { return layers_on_new_tokens(ARGUMENTS, product); });
}
OPERATOR(cached_layers_bfloat16) {
    return guarded([&] { return layers_on_new_tokens(ARGUMENTS, product_bfloat16); });
}
OPERATOR(head_logits) {
    return guarded([&] { return logits_of_rows(ARGUMENTS, product); });
}
OPERATOR(head_logits_bfloat16) {
    return guarded([&] { return logits_of_rows(ARGUMENTS, product_bfloat16); });
}
OPERATOR(layers) {
    return guarded([&] { return layers_in_training(ARGUMENTS, product, false); });
}
OPERATOR(layers_bfloat16) {
    return guarded([&] { return layers_in_training(ARGUMENTS, product_bfloat16, false); });
}
OPERATOR(kept_layers) {
    return guarded([&] { return layers_in_training(ARGUMENTS, product, true); });
}
OPERATOR(kept_layers_bfloat16) {
    return guarded([&] { return layers_in_training(ARGUMENTS, product_bfloat16, true); });
}
OPERATOR(layers_gradient) {
    return guarded([&] { return gradient_of_layers(ARGUMENTS, product); });
}
OPERATOR(layers_gradient_bfloat16) {
    return guarded([&] { return gradient_of_layers(ARGUMENTS, product_bfloat16); });
}
