// Leaky (continuous-time) recurrent network, Jaeger et al. 2007, with a learned rate a unit: a cell in one page of maths. It has no
// backward: that is made of dual numbers. Loaded and trained by leaky.py.
//   h' = h + σ(r) (tanh(ẑ) − h)          ẑ = W x + U h + b
struct Leaky {
  static constexpr Slot slots[] = {{"z", X | H}, {"rate", 0}};  // what W and U feed; the rate's gradient has a place of its own
  static constexpr PerUnit vectors[] = {{"rate", 1, Factor::Itself}};
  static constexpr const char* states[] = {"h"};

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V*) {
    const V rate = sigmoid(w[0]);
    s1[0] = s[0] + rate * (tanh(a[0]) - s[0]);
  }
};

RNN_CELL(leaky, HOT, Leaky)
