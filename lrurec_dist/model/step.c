/* One more event of some users: the whole model for one position, without the dozen calls a block that take longer than its
   arithmetic. Every user's result is a function of its own row and state alone. */

#include <math.h>
#include <stdint.h>

#define VECTOR _Pragma("GCC ivdep")
#define LANES 16
#define WIDE (4 * LANES) /* outputs whose sums stay in registers */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

/* y = bias + x W for W (inputs, outputs); returns where the parameters go on. */
static const float *product(const float *w, int64_t inputs, int64_t outputs, const float *x, float *y) {
  const float *bias = w + inputs * outputs;
  int64_t j = 0;
  for (; j + WIDE <= outputs; j += WIDE) {
    vec sums[4];
    for (int i = 0; i < 4; i++) sums[i] = *(const vec *)(bias + j + i * LANES);
    for (int64_t k = 0; k < inputs; k++)
      for (int i = 0; i < 4; i++) sums[i] += x[k] * *(const vec *)(w + k * outputs + j + i * LANES);
    for (int i = 0; i < 4; i++) *(vec *)(y + j + i * LANES) = sums[i];
  }
  for (; j < outputs; j++) {
    float sum = bias[j];
    for (int64_t k = 0; k < inputs; k++) sum += x[k] * w[k * outputs + j];
    y[j] = sum;
  }
  return bias + outputs;
}

/* x = LayerNorm(x + y), y may be null; scale and shift lie at w. */
static const float *normalise(const float *w, int64_t dim, float epsilon, const float *y, float *x) {
  float mean = 0, square = 0;
  for (int64_t i = 0; i < dim; i++) mean += x[i] += y ? y[i] : 0;
  mean /= dim;
  for (int64_t i = 0; i < dim; i++) square += (x[i] - mean) * (x[i] - mean);
  float scale = 1 / sqrtf(square / dim + epsilon);
  for (int64_t i = 0; i < dim; i++) x[i] = (x[i] - mean) * scale * w[i] + w[dim + i];
  return w + 2 * dim;
}

/* vectors (users, dim) holds rows of the table and becomes the last block's output; states (users, blocks, 2, hidden) in
   place. Parameters are those that `Stepper` packs, in the order in which they are used. */
void step_users(int64_t users, int64_t blocks, int64_t dim, int64_t hidden, int threads, float epsilon,
                const float *parameters, float *states, float *vectors) {
  _Pragma("omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)")
  for (int64_t user = 0; user < users; user++) {
    float *x = vectors + user * dim, drive[2 * hidden], inner[4 * dim], y[dim];
    const float *w = normalise(parameters, dim, epsilon, 0, x);
    for (int64_t block = 0; block < blocks; block++) {
      float *h = states + (user * blocks + block) * 2 * hidden;
      const float *decay_re = w, *decay_im = w + hidden;
      w = product(w + 2 * hidden, dim, 2 * hidden, x, drive);
      VECTOR
      for (int64_t j = 0; j < hidden; j++) {
        float re = h[j], im = h[hidden + j];
        h[j] = drive[j] + decay_re[j] * re - decay_im[j] * im;
        h[hidden + j] = drive[hidden + j] + decay_re[j] * im + decay_im[j] * re;
      }
      w = product(w, 2 * hidden, dim, h, y);
      w = normalise(w, dim, epsilon, y, x);
      w = product(w, dim, 4 * dim, x, inner);
      for (int64_t i = 0; i < 4 * dim; i++) inner[i] *= 0.5f * (1 + erff(inner[i] * 0.707106781f));
      w = product(w, 4 * dim, dim, inner, y);
      w = normalise(w, dim, epsilon, y, x);
    }
  }
}
