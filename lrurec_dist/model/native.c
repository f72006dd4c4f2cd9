/* What PyTorch's elementwise operations need many passes over memory for, in one pass each.

   Threads share out sequences, elements or targets; no result depends on how many there are.
   Arrays do not overlap unless a comment says "in place". */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define PARALLEL _Pragma("omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)")
#define VECTOR _Pragma("GCC ivdep")

/* ---- The recurrence ----

   Row r of a (rows, 2, hidden) array is the real plane and the imaginary plane of one position.
   spans[2 s] and spans[2 s + 1] are the first row of sequence s and one past its last. `initial`
   may be null; `zero` is 2 * hidden zeros. The states of one step stay in the first-level cache. */

#define SCAN(T, NAME)                                                                           \
  /* states[t] = decay * states[t - 1] + inputs[t] */                                              \
  void scan_##NAME(int64_t sequences, int64_t hidden, int threads, const int64_t *spans,        \
                      const T *decay, const T *initial, const T *zero, const T *inputs,            \
                      T *states) {                                                                 \
    const T *decay_re = decay, *decay_im = decay + hidden;                                         \
    PARALLEL                                                                                       \
    for (int64_t s = 0; s < sequences; s++) {                                                      \
      const T *before = initial ? initial + s * 2 * hidden : zero;                                 \
      for (int64_t t = spans[2 * s]; t < spans[2 * s + 1]; t++) {                                  \
        const T *x = inputs + t * 2 * hidden;                                                      \
        T *h = states + t * 2 * hidden;                                                            \
        VECTOR                                                                                     \
        for (int64_t j = 0; j < hidden; j++) {                                                     \
          T re = before[j], im = before[hidden + j];                                               \
          h[j] = x[j] + decay_re[j] * re - decay_im[j] * im;                                       \
          h[hidden + j] = x[hidden + j] + decay_re[j] * im + decay_im[j] * re;                     \
        }                                                                                          \
        before = h;                                                                                \
      }                                                                                            \
    }                                                                                              \
  }                                                                                                \
  /* adjoint[t] = grad[t] + conj(decay) * adjoint[t + 1];                                          \
     grad_decay[s] += sum over t of adjoint[t] * conj(states[t - 1]), one sum a sequence */        \
  void scan_backward_##NAME(int64_t sequences, int64_t hidden, int threads, const int64_t *spans,       \
                       const T *decay, const T *initial, const T *zero, const T *grad,             \
                       const T *states, T *adjoint, T *grad_decay) {                               \
    const T *decay_re = decay, *decay_im = decay + hidden;                                         \
    PARALLEL                                                                                       \
    for (int64_t s = 0; s < sequences; s++) {                                                      \
      const T *after = zero, *start = initial ? initial + s * 2 * hidden : zero;                   \
      T *sum = grad_decay + s * 2 * hidden;                                                        \
      for (int64_t t = spans[2 * s + 1] - 1; t >= spans[2 * s]; t--) {                             \
        const T *g = grad + t * 2 * hidden;                                                        \
        const T *h = t > spans[2 * s] ? states + (t - 1) * 2 * hidden : start;                     \
        T *a = adjoint + t * 2 * hidden;                                                           \
        VECTOR                                                                                     \
        for (int64_t j = 0; j < hidden; j++) {                                                     \
          T re = g[j] + decay_re[j] * after[j] + decay_im[j] * after[hidden + j];                  \
          T im = g[hidden + j] + decay_re[j] * after[hidden + j] - decay_im[j] * after[j];         \
          a[j] = re;                                                                               \
          a[hidden + j] = im;                                                                      \
          sum[j] += h[j] * re + h[hidden + j] * im;                                                \
          sum[hidden + j] += h[j] * im - h[hidden + j] * re;                                       \
        }                                                                                          \
        after = a;                                                                                 \
      }                                                                                            \
    }                                                                                              \
  }

SCAN(float, float32)
SCAN(double, float64)

/* ---- Exponentials ---- */

/* exp(x) for x <= 0 within 2 units in the last place; 0 below -87. Degree 6 on |r| <= ln(2) / 2. */
static inline float exp_negative(float x) {
  float clipped = x < -87.0f ? -87.0f : x;
  float n = rintf(clipped * 1.44269504f);
  float r = clipped - n * 0.693145752f - n * 1.42860677e-6f;
  float p = 1.38949e-3f;
  p = p * r + 8.3334e-3f;
  p = p * r + 4.16666e-2f;
  p = p * r + 0.166666667f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}

static inline float to_float(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint16_t to_bfloat16(float x) { /* to nearest, ties to even; not for NaN */
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* scores (items, targets), in place where `rounded` is null: exp(scores + bias - highest), also
   written to `rounded` in bfloat16. With `find_highest`, highest (targets) first rises to the
   greatest of itself and this tile's scores, and exp_sum (targets) is brought to that level. */
#define BLOCK 256 /* most targets a thread takes at a time: their running values stay in cache */
#define CHUNK 64  /* items summed before they join the running sum, so that rounding does not pile up */
void softmax_tile(int64_t items, int64_t targets, int threads, int find_highest, float *scores,
                  const float *bias, float *highest, float *exp_sum, uint16_t *rounded) {
  int64_t block = ((targets + threads - 1) / threads + 15) / 16 * 16; /* whole cache lines */
  if (block > BLOCK) block = BLOCK;
  PARALLEL
  for (int64_t low = 0; low < targets; low += block) {
    int64_t n = targets - low < block ? targets - low : block;
    float *top = highest + low, *sum = exp_sum + low, old[BLOCK];
    if (find_highest) {
      memcpy(old, top, n * sizeof(float));
      for (int64_t i = 0; i < items; i++) {
        const float *s = scores + i * targets + low;
        VECTOR
        for (int64_t j = 0; j < n; j++) top[j] = s[j] + bias[i] > top[j] ? s[j] + bias[i] : top[j];
      }
      VECTOR
      for (int64_t j = 0; j < n; j++) sum[j] *= exp_negative(old[j] - top[j]);
    }
    for (int64_t first = 0; first < items; first += CHUNK) {
      float part[BLOCK] = {0};
      for (int64_t i = first; i < items && i < first + CHUNK; i++) {
        float *s = scores + i * targets + low;
        if (rounded) {
          uint16_t *out = rounded + i * targets + low;
          VECTOR
          for (int64_t j = 0; j < n; j++) {
            float e = exp_negative(s[j] + bias[i] - top[j]);
            part[j] += e;
            out[j] = to_bfloat16(e);
          }
        } else {
          VECTOR
          for (int64_t j = 0; j < n; j++) {
            s[j] = exp_negative(s[j] + bias[i] - top[j]);
            part[j] += s[j];
          }
        }
      }
      if (find_highest) {
        VECTOR
        for (int64_t j = 0; j < n; j++) sum[j] += part[j];
      }
    }
  }
}

/* ---- Dropout, alone or behind GELU ----

   The mask is a hash of (seed, element), so it is never stored: the backward pass draws it again. */

static inline uint32_t hash(uint32_t x) { /* two rounds of multiply and xor-shift mix all bits */
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0x735a2d97u;
  return x ^ (x >> 15);
}

/* The normal distribution function to 2e-7 (Abramowitz and Stegun 7.1.26) and exp(-x^2 / 2). */
static inline float normal(float x, float *density) {
  float z = fabsf(x) * 0.707106781f, t = 1.0f / (1.0f + 0.3275911f * z), e = exp_negative(-z * z);
  float tail = 0.5f * e * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  *density = e;
  return x >= 0 ? 1.0f - tail : tail;
}

#define SAME(x) (x)
#define STRETCH 8192 /* elements a thread takes at a time */
/* `dropped` is the probability in units of 2^-32; kept elements are multiplied by `scale`. */
#define DROPOUT(T, NAME, LOAD, STORE)                                                              \
  void dropout_##NAME(int64_t elements, int threads, int gelu, uint32_t seed, uint32_t salt,       \
                      uint32_t dropped, float scale, const T *x, T *y) {                           \
    PARALLEL                                                                                       \
    for (int64_t low = 0; low < elements; low += STRETCH) {                                        \
      int32_t n = elements - low < STRETCH ? elements - low : STRETCH;                             \
      uint32_t key = hash(seed + hash(salt + (uint32_t)(low / STRETCH)));                          \
      VECTOR                                                                                       \
      for (int32_t j = 0; j < n; j++) {                                                            \
        float value = LOAD(x[low + j]), density;                                                   \
        float factor = hash(key + (uint32_t)j * 0x9e3779b9u) >= dropped ? scale : 0.0f;            \
        if (gelu) value *= normal(value, &density);                                                \
        y[low + j] = STORE(value * factor);                                                        \
      }                                                                                            \
    }                                                                                              \
  }                                                                                                \
  void dropout_backward_##NAME(int64_t elements, int threads, int gelu, uint32_t seed,             \
                               uint32_t salt, uint32_t dropped, float scale, const T *x,           \
                               const T *grad, T *y) {                                              \
    PARALLEL                                                                                       \
    for (int64_t low = 0; low < elements; low += STRETCH) {                                        \
      int32_t n = elements - low < STRETCH ? elements - low : STRETCH;                             \
      uint32_t key = hash(seed + hash(salt + (uint32_t)(low / STRETCH)));                          \
      VECTOR                                                                                       \
      for (int32_t j = 0; j < n; j++) {                                                            \
        float factor = hash(key + (uint32_t)j * 0x9e3779b9u) >= dropped ? scale : 0.0f;            \
        float slope = 1.0f;                                                                        \
        if (gelu) {                                                                                \
          float value = LOAD(x[low + j]), density, below = normal(value, &density);                \
          slope = below + value * density * 0.39894228f;                                           \
        }                                                                                          \
        y[low + j] = STORE(LOAD(grad[low + j]) * slope * factor);                                  \
      }                                                                                            \
    }                                                                                              \
  }

DROPOUT(float, float32, SAME, SAME)
DROPOUT(uint16_t, bfloat16, to_float, to_bfloat16)
