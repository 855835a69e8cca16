// Untrusted text (paths, class names) made safe for terminals and JSON readers, numbers as text, and base64.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

using std::string;

// The code point of UTF-8 `text` at `i`, which advances; an invalid byte gives 0xDC00 + byte, as in Python.
inline char32_t next_point(const string& text, size_t& i) {
  const uint8_t first = text[i];
  const size_t length =
      first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF5 ? 4 : 0;
  char32_t point = length < 2 ? first : first & (0x7F >> length);
  bool valid = length > 0 && i + length <= text.size();
  for (size_t k = 1; valid && k < length; k++) {
    valid = (text[i + k] & 0xC0) == 0x80;
    point = point << 6 | (text[i + k] & 0x3F);
  }
  if (length == 3) valid = valid && point >= 0x800 && (point < 0xD800 || point > 0xDFFF);
  if (length == 4) valid = valid && point >= 0x10000 && point <= 0x10FFFF;
  i += valid ? length : 1;
  return valid ? point : 0xDC00 + first;
}

inline string hex(const char* prefix, int digits, char32_t point) {
  char text[16];
  std::snprintf(text, sizeof text, "%s%0*x", prefix, digits, unsigned(point));
  return text;
}

// Untrusted text for a terminal: control characters and invisible characters are escaped.
inline string printable(const string& text) {
  static const char32_t invisible[][2] = {
      {0, 0x1F},        {0x7F, 0xA0},     {0xAD, 0xAD},     {0x600, 0x605},   {0x61C, 0x61C},
      {0x1680, 0x1680}, {0x180E, 0x180E}, {0x2000, 0x200F}, {0x2028, 0x202F}, {0x205F, 0x206F},
      {0x3000, 0x3000}, {0xD800, 0xF8FF}, {0xFEFF, 0xFEFF}, {0xFFF0, 0xFFFB}, {0xE0000, 0x10FFFF}};
  string out;
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    const char32_t c = next_point(text, i);
    bool visible = true;
    for (const auto& range : invisible) visible = visible && (c < range[0] || c > range[1]);
    if (visible)
      out += text.substr(start, i - start);
    else if (c == '\n' || c == '\r' || c == '\t')
      out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
    else
      out += c < 0x100 ? hex("\\x", 2, c) : c < 0x10000 ? hex("\\u", 4, c) : hex("\\U", 8, c);
  }
  return out;
}

// A JSON string in ASCII. nlohmann's own writer refuses text that is not UTF-8, which a path may be.
inline string quoted(const string& text) {
  string out = "\"";
  for (size_t i = 0; i < text.size();) {
    const char32_t c = next_point(text, i);
    if (c == '"' || c == '\\')
      out += {'\\', char(c)};
    else if (c >= ' ' && c < 0x7F)
      out += char(c);
    else if (c < 0x10000)
      out += hex("\\u", 4, c);
    else  // a surrogate pair
      out += hex("\\u", 4, 0xD7C0 + (c >> 10)) + hex("\\u", 4, 0xDC00 + (c & 0x3FF));
  }
  return out + '"';
}

// A number with six decimals, as results are written.
inline double rounded(double value) {
  char text[400];  // the largest double has 309 digits
  std::snprintf(text, sizeof text, "%.6f", value);
  return std::atof(text);
}

// A fraction as a percentage with this many decimals.
inline string percent(double fraction, int decimals) {
  char text[400];
  std::snprintf(text, sizeof text, "%.*f%%", decimals, fraction * 100);
  return text;
}

// Decodes base64 text. Throws std::invalid_argument.
inline string base64_bytes(const string& text) {
  static const string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  string bytes;
  uint32_t bits = 0;
  int count = 0;  // of bits that are not in `bytes` yet
  for (const char c : text.substr(0, text.find('='))) {
    const size_t digit = digits.find(c);
    if (digit == string::npos) throw std::invalid_argument("not base64");
    bits = bits << 6 | uint32_t(digit);
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes += char(bits >> count);
    }
  }
  return bytes;
}
