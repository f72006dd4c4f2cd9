/* Ranking without a matrix of scores: products are compared as they come out of the registers.

   The score of a user and a row of the table is bias + v[0] w[0] + v[1] w[1] + …, summed in this
   order, by fused multiplications where the processor has them. It is a function of the two alone:
   on tiles, threads and parts of the catalogue nothing depends, ties included.

   Lanes of a register are users, whose vectors are packed once; rows are read as they lie. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define BLOCK 12 /* rows at a time: with two registers of users each, 24 of 32 registers are sums */
#define SPREAD(x) ((vec)_mm512_set1_ps(x))
#define FUSED(a, b, c) ((vec)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define SCALAR_FUSED(a, b, c) __builtin_fmaf(a, b, c)
#define HIGHER(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b))) /* b where a is not a number */
#define ABOVE(a, b) ((uint32_t)_mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_GT_OQ))
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LANES 8
#define BLOCK 6
#define SPREAD(x) ((vec)_mm256_set1_ps(x))
#define FUSED(a, b, c) ((vec)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define SCALAR_FUSED(a, b, c) __builtin_fmaf(a, b, c)
#define HIGHER(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define ABOVE(a, b) ((uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_GT_OQ)))
#else
#define LANES 4
#define BLOCK 6
#define SPREAD(x) ((x) - (vec){0})
#define FUSED(a, b, c) ((a) * (b) + (c))
#define SCALAR_FUSED(a, b, c) ((a) * (b) + (c))
#define HIGHER(a, b) ((vec)((((a) > (b)) & (ints)(a)) | (~((a) > (b)) & (ints)(b))))
#define ABOVE(a, b) above_bits((a) > (b))
#endif
#define GROUP (2 * LANES) /* users of a block; divides 32 */
#define TILE 128          /* users whose groups take turns at the same rows */
#define PARALLEL(tasks) _Pragma("omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)") \
  for (int64_t task = 0; task < (tasks); task++)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4)));

#if LANES == 4
static inline uint32_t above_bits(ints greater) {
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; lane++) bits |= (greater[lane] ? 1u : 0u) << lane;
  return bits;
}
#endif

static inline float number(const void *values, int narrow, int64_t at) {
  if (!narrow) return ((const float *)values)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)values)[at] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* What a ranking works on: rows [begin, end) of the table, in bfloat16 if `narrow`; `chunk` of them
   stay in the second-level cache. `packed` holds the vectors of the users, rounded up to 32, in
   groups; `wide` one chunk of rows a thread if narrow. A task is a tile of users and one of `parts`
   of the rows, so that few users keep many threads busy. */
typedef struct {
  int64_t users, begin, end, dim, chunk, parts, narrow;
  const float *vectors;
  const void *weight;
  const float *bias;
  float *packed, *wide;
} problem;

static void pack(const problem *p, int threads) {
  PARALLEL((p->users + GROUP - 1) / GROUP) {
    float *to = p->packed + task * GROUP * p->dim;
    for (int64_t lane = 0; lane < GROUP; lane++) {
      int64_t user = task * GROUP + lane;
      for (int64_t k = 0; k < p->dim; k++) to[k * GROUP + lane] = user < p->users ? p->vectors[user * p->dim + k] : 0;
    }
  }
}

/* scores (BLOCK, GROUP) of a group with `rows` rows; from the last on, rows repeat. A function of its
   own, so that what is done with scores takes no registers from the sums. */
static __attribute__((noinline)) void score_block(const float *packed, const float *weight, const float *bias,
                                                  int64_t dim, int64_t rows, float *scores) {
  const float *w[BLOCK];
  vec sums[BLOCK][2];
#pragma GCC unroll 12
  for (int r = 0; r < BLOCK; r++) {
    int64_t row = r < rows ? r : rows - 1;
    w[r] = weight + row * dim;
    sums[r][0] = sums[r][1] = SPREAD(bias[row]);
  }
  for (int64_t k = 0; k < dim; k++) {
    vec first = *(const vec *)(packed + k * GROUP), second = *(const vec *)(packed + k * GROUP + LANES);
    __builtin_prefetch(weight + BLOCK * dim + k * 16); /* the next block, more streams than the processor foresees */
#pragma GCC unroll 12
    for (int r = 0; r < BLOCK; r++) {
      vec each = SPREAD(w[r][k]);
      sums[r][0] = FUSED(first, each, sums[r][0]);
      sums[r][1] = FUSED(second, each, sums[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < BLOCK; r++) {
    *(vec *)(scores + r * GROUP) = sums[r][0];
    *(vec *)(scores + r * GROUP + LANES) = sums[r][1];
  }
}

/* A task: what it is about, and the chunks of rows it goes through. */
typedef struct {
  int64_t first_user, last_user, part, row, end, rows;
  const float *weight;
} place;

static place start(const problem *p, int64_t task) {
  place at = {.first_user = task / p->parts * TILE, .part = task % p->parts};
  int64_t share = (p->end - p->begin + p->parts - 1) / p->parts;
  at.last_user = at.first_user + TILE < p->users ? at.first_user + TILE : p->users;
  at.row = p->begin + at.part * share;
  at.end = at.row + share < p->end ? at.row + share : p->end;
  return at;
}

static int next_chunk(const problem *p, place *at) {
  at->row += at->rows;
  if (at->row >= at->end) return 0;
  at->rows = at->end - at->row < p->chunk ? at->end - at->row : p->chunk;
  at->weight = (const float *)p->weight + at->row * p->dim;
  if (p->narrow) {
    float *to = p->wide + omp_get_thread_num() * p->chunk * p->dim;
    for (int64_t i = 0; i < at->rows * p->dim; i++) to[i] = number(p->weight, 1, at->row * p->dim + i);
    at->weight = to;
  }
  return 1;
}

static int64_t tasks_of(const problem *p) { return (p->users + TILE - 1) / TILE * p->parts; }

/* scores (pairs) of users[i] and rows[i]. Several at a time: the sum of one is a chain. */
#define CHAINS 8
#define PAIRS 256 /* of a task */
void score_pairs(int64_t pairs, int64_t dim, int threads, int narrow, const int64_t *users, const int64_t *rows,
                 const float *vectors, const void *weight, const float *bias, float *scores) {
  PARALLEL((pairs + PAIRS - 1) / PAIRS) {
    int64_t end = (task + 1) * PAIRS < pairs ? (task + 1) * PAIRS : pairs;
    for (int64_t low = task * PAIRS; low < end; low += CHAINS) {
      const float *v[CHAINS];
      int64_t w[CHAINS];
      float sums[CHAINS];
      for (int i = 0; i < CHAINS; i++) {
        int64_t pair = low + i < end ? low + i : end - 1, later = low + i + 2 * CHAINS < end ? low + i + 2 * CHAINS : end - 1;
        v[i] = vectors + users[pair] * dim;
        w[i] = rows[pair] * dim;
        sums[i] = bias[rows[pair]];
        int64_t size = narrow ? 2 : 4;
        for (int64_t at = 0; at < dim * size; at += 64) __builtin_prefetch((const char *)weight + rows[later] * dim * size + at);
      }
      for (int64_t k = 0; k < dim; k++)
#pragma GCC unroll 8
        for (int i = 0; i < CHAINS; i++) sums[i] = SCALAR_FUSED(v[i][k], number(weight, narrow, w[i] + k), sums[i]);
      for (int i = 0; i < CHAINS && low + i < end; i++) scores[low + i] = sums[i];
    }
  }
}

/* ahead (parts, users): rows that score above the user's target, or equal where they lie before
   tied_until[user]. */
void count_ahead(int64_t users, int64_t begin, int64_t end, int64_t dim, int64_t chunk, int64_t parts, int threads, int narrow,
                 const float *vectors, const void *weight, const float *bias, float *packed, float *wide, const float *targets,
                 const int64_t *tied_until, int64_t *ahead) {
  problem p = {users, begin, end, dim, chunk, parts, narrow, vectors, weight, bias, packed, wide};
  pack(&p, threads);
  PARALLEL(tasks_of(&p)) {
    float bars[TILE], scores[BLOCK * GROUP];
    int32_t counts[TILE] = {0};
    int64_t change[TILE / GROUP]; /* the row at which the next bar of a group changes */
    place at = start(&p, task);
    for (int64_t i = 0; i < TILE; i++) bars[i] = INFINITY;
    for (int64_t g = 0; g < TILE / GROUP; g++) change[g] = at.row;
    while (next_chunk(&p, &at))
      for (int64_t low = 0; low < at.last_user - at.first_user; low += GROUP) {
        float *bar = bars + low;
        int64_t *next = change + low / GROUP, user = at.first_user + low;
        int64_t present = at.last_user - user < GROUP ? at.last_user - user : GROUP;
        for (int64_t r = 0; r < at.rows; r += BLOCK) {
          int64_t n = at.rows - r < BLOCK ? at.rows - r : BLOCK, counted = 0, row = at.row + r;
          score_block(packed + user * dim, at.weight + r * dim, bias + row, dim, n, scores);
          while (counted < n) {
            if (*next == row + counted) { /* equal scores counted up to here, for one or more of the users */
              int64_t now = *next;
              *next = INT64_MAX;
              for (int64_t i = 0; i < present; i++) {
                int64_t until = tied_until[user + i];
                bar[i] = now < until ? nextafterf(targets[user + i], -INFINITY) : targets[user + i];
                if (until > now && until < *next) *next = until;
              }
            }
            int64_t stop = *next - row < n ? *next - row : n;
            ints first = *(ints *)(counts + low), second = *(ints *)(counts + low + LANES);
            vec low_bar = *(vec *)bar, high_bar = *(vec *)(bar + LANES);
            for (; counted < stop; counted++) {
              first -= *(vec *)(scores + counted * GROUP) > low_bar;
              second -= *(vec *)(scores + counted * GROUP + LANES) > high_bar;
            }
            *(ints *)(counts + low) = first;
            *(ints *)(counts + low + LANES) = second;
          }
        }
      }
    for (int64_t i = 0; i < at.last_user - at.first_user; i++) ahead[at.part * users + at.first_user + i] = counts[i];
  }
}

/* ---- Lists ----

   A key orders a score and a row as one signed number: higher scores first, then lower rows. */

static inline int64_t key_of(float score, int64_t row) {
  int32_t bits;
  score += 0.0f; /* -0 becomes 0, its equal */
  memcpy(&bits, &score, sizeof bits);
  if (bits < 0) bits ^= 0x7fffffff;
  return (int64_t)(((uint64_t)(uint32_t)bits << 32) | (uint32_t)~(uint32_t)row);
}

static inline float score_of(int64_t key) {
  int32_t bits = (int32_t)(key >> 32);
  float score;
  if (bits < 0) bits ^= 0x7fffffff;
  memcpy(&score, &bits, sizeof score);
  return score;
}

static inline void swap(int64_t *a, int64_t *b) {
  int64_t held = *a;
  *a = *b;
  *b = held;
}

/* Where one of n >= 3 keys ends up once larger ones stand before it; keys differ. Without a branch on
   what is compared: no processor would foresee it. */
static int64_t split(int64_t *keys, int64_t n) {
  int64_t *a = keys, *b = keys + n / 2, *last = keys + n - 1, after = 0;
  if (*a > *b) swap(a, b);
  if (*last < *a) swap(last, a);
  if (*last > *b) swap(last, b); /* the middle one of three */
  for (int64_t i = 0; i < n - 1; i++) {
    int64_t key = keys[i];
    keys[i] = keys[after];
    keys[after] = key;
    after += key > *last;
  }
  swap(last, keys + after);
  return after;
}

#define FEW 24 /* keys that insertion sorts fastest */
static void sort(int64_t *keys, int64_t n) {
  while (n > FEW) {
    int64_t middle = split(keys, n);
    sort(keys + middle + 1, n - middle - 1);
    n = middle;
  }
  for (int64_t i = 1; i < n; i++) {
    int64_t key = keys[i], j = i;
    for (; j > 0 && keys[j - 1] < key; j--) keys[j] = keys[j - 1];
    keys[j] = key;
  }
}

/* The k largest to the front, the smallest of them last. */
static void select_largest(int64_t *keys, int64_t n, int64_t k) {
  int64_t low = 0, place = k - 1;
  while (n - low > FEW) {
    int64_t middle = low + split(keys + low, n - low);
    if (middle == place) return;
    if (middle < place) low = middle + 1;
    else n = middle;
  }
  sort(keys + low, n - low);
}

/* lists (parts, users, room): the first k of a list are the keys of the user's best rows, best first,
   and INT64_MIN where there are fewer. No rows are user u's excluded[offsets[u]:offsets[u + 1]]. */
void best_rows(int64_t users, int64_t begin, int64_t end, int64_t dim, int64_t chunk, int64_t parts, int threads, int narrow,
               const float *vectors, const void *weight, const float *bias, float *packed, float *wide, int64_t k, int64_t room,
               const int64_t *offsets, const int32_t *excluded, int64_t *lists) {
  problem p = {users, begin, end, dim, chunk, parts, narrow, vectors, weight, bias, packed, wide};
  pack(&p, threads);
  PARALLEL(tasks_of(&p)) {
    float bars[TILE], scores[BLOCK * GROUP]; /* whoever is not above the bar has k others before it */
    int64_t lengths[TILE] = {0};
    place at = start(&p, task);
    for (int64_t i = 0; i < TILE; i++) bars[i] = i < at.last_user - at.first_user ? -INFINITY : INFINITY;
    while (next_chunk(&p, &at))
      for (int64_t low = 0; low < at.last_user - at.first_user; low += GROUP)
        for (int64_t r = 0; r < at.rows; r += BLOCK) {
          int64_t n = at.rows - r < BLOCK ? at.rows - r : BLOCK;
          score_block(packed + (at.first_user + low) * dim, at.weight + r * dim, bias + at.row + r, dim, n, scores);
          vec first = *(vec *)(bars + low), second = *(vec *)(bars + low + LANES);
          vec highest = first, highest_of_second = second;
          for (int64_t i = 0; i < BLOCK; i++) {
            vec low_score = *(vec *)(scores + i * GROUP), high_score = *(vec *)(scores + i * GROUP + LANES);
            highest = HIGHER(low_score, highest);
            highest_of_second = HIGHER(high_score, highest_of_second);
          }
          if (!(ABOVE(highest, first) | ABOVE(highest_of_second, second))) continue;
          for (int64_t i = 0; i < n; i++) {
            uint32_t above = ABOVE(*(vec *)(scores + i * GROUP), first) | ABOVE(*(vec *)(scores + i * GROUP + LANES), second) << LANES;
            for (; above; above &= above - 1) {
              int64_t lane = low + __builtin_ctz(above), user = at.first_user + lane, row = at.row + r + i;
              int32_t out = 0;
              for (int64_t e = offsets[user]; e < offsets[user + 1]; e++) out |= excluded[e] == (int32_t)row;
              if (out) continue;
              int64_t *list = lists + (at.part * users + user) * room;
              list[lengths[lane]++] = key_of(scores[i * GROUP + lane - low], row);
              if (lengths[lane] == room) {
                select_largest(list, room, k);
                lengths[lane] = k;
                bars[lane] = score_of(list[k - 1]);
              }
            }
          }
        }
    for (int64_t i = 0; i < at.last_user - at.first_user; i++) {
      int64_t *list = lists + (at.part * users + at.first_user + i) * room, length = lengths[i];
      if (length > k) select_largest(list, length, k);
      sort(list, length < k ? length : k);
      for (int64_t j = length; j < k; j++) list[j] = INT64_MIN;
    }
  }
}
