// Untrusted text (paths, class names) made safe for terminals and JSON readers, numbers as text,
// and base64.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

using std::string;

// How many bytes of UTF-8 a character has that starts with this byte; 0 if none does.
inline size_t character_size(uint8_t first) {
  if (first < 0x80) return 1;
  if (first < 0xC2) return 0;
  if (first < 0xE0) return 2;
  if (first < 0xF0) return 3;
  if (first < 0xF5) return 4;
  return 0;
}

// The code point of UTF-8 `text` at `i`, which advances; an invalid byte gives 0xDC00 + byte, as in
// Python.
inline char32_t next_point(const string& text, size_t& i) {
  const uint8_t first = text[i];
  const size_t size = character_size(first);

  char32_t point = first;
  if (size > 1) point &= 0x7F >> size;
  bool valid = size > 0 && i + size <= text.size();
  for (size_t k = 1; valid && k < size; k++) {
    valid = (text[i + k] & 0xC0) == 0x80;
    point = point << 6 | (text[i + k] & 0x3F);
  }

  const bool is_surrogate = point >= 0xD800 && point <= 0xDFFF;
  if (size == 3) valid = valid && point >= 0x800 && !is_surrogate;
  if (size == 4) valid = valid && point >= 0x10000 && point <= 0x10FFFF;

  i += valid ? size : 1;
  return valid ? point : 0xDC00 + first;
}

inline size_t count_characters(const string& text) {
  size_t count = 0;
  for (size_t i = 0; i < text.size(); count++) next_point(text, i);
  return count;
}

inline string hex(const char* prefix, int digits, char32_t point) {
  char text[16];
  std::snprintf(text, sizeof text, "%s%0*x", prefix, digits, unsigned(point));
  return text;
}

// Whether a character draws something and cannot change how others are drawn.
inline bool is_visible(char32_t point) {
  static const char32_t invisible[][2] = {
      {0, 0x1F},        {0x7F, 0xA0},     {0xAD, 0xAD},     {0x600, 0x605},
      {0x61C, 0x61C},   {0x1680, 0x1680}, {0x180E, 0x180E}, {0x2000, 0x200F},
      {0x2028, 0x202F}, {0x205F, 0x206F}, {0x3000, 0x3000}, {0xD800, 0xF8FF},
      {0xFEFF, 0xFEFF}, {0xFFF0, 0xFFFB}, {0xE0000, 0x10FFFF}};
  for (const auto& range : invisible)
    if (point >= range[0] && point <= range[1]) return false;
  return true;
}

inline string escaped(char32_t point) {
  if (point == '\n') return "\\n";
  if (point == '\r') return "\\r";
  if (point == '\t') return "\\t";
  if (point < 0x100) return hex("\\x", 2, point);
  if (point < 0x10000) return hex("\\u", 4, point);
  return hex("\\U", 8, point);
}

// Untrusted text for a terminal: control characters and invisible characters are escaped.
inline string printable(const string& text) {
  string out;
  for (size_t i = 0; i < text.size();) {
    const size_t start = i;
    const char32_t point = next_point(text, i);
    if (is_visible(point))
      out += text.substr(start, i - start);
    else
      out += escaped(point);
  }
  return out;
}

// A JSON string in ASCII. nlohmann's own writer refuses text that is not UTF-8, which a path may
// be.
inline string quoted(const string& text) {
  string out = "\"";
  for (size_t i = 0; i < text.size();) {
    const char32_t point = next_point(text, i);
    if (point == '"' || point == '\\')
      out += {'\\', char(point)};
    else if (point >= ' ' && point < 0x7F)
      out += char(point);
    else if (point >= 0xDC00 && point <= 0xDFFF)  // no UTF-8, which JSON cannot hold: as printed
      out += "\\" + hex("\\u", 4, point);
    else if (point < 0x10000)
      out += hex("\\u", 4, point);
    else  // a surrogate pair
      out += hex("\\u", 4, 0xD7C0 + (point >> 10)) + hex("\\u", 4, 0xDC00 + (point & 0x3FF));
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

// A number with commas: 1,234,567.
inline string grouped(uint64_t number) {
  string text = std::to_string(number);
  for (int at = int(text.size()) - 3; at > 0; at -= 3) text.insert(at, ",");
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
