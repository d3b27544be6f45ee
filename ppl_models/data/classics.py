r"""Small data sets that are printed in papers.

- ``SCHOOLS``: effect of coaching in eight schools and its standard error (Rubin 1981).
- ``RATS``: weights of thirty rats in grams, at five days (Gelfand, Hills, Racine-Poon and Smith 1990).
- ``LSAT``: answers of 1,000 persons to five items, section 6 of the Law School Admission Test, by pattern of answers
  (Bock and Lieberman 1970).
- ``EARTHQUAKES``: earthquakes of magnitude 7 or more in the world, 1900 to 2006 (Zucchini and MacDonald 2009).
- ``NILE``: annual flow of the Nile at Aswan in 10^8 cubic metres, 1871 to 1970 (Cobb 1978).

``tests/test_classics.py`` compares what is published about each with these numbers.
"""

from __future__ import annotations

import itertools

import numpy as np


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), float)


SCHOOLS = ((28.0, 15.0), (8.0, 10.0), (-3.0, 16.0), (7.0, 11.0), (-1.0, 9.0), (1.0, 11.0), (18.0, 10.0), (12.0, 18.0))


DAYS = (8, 15, 22, 29, 36)
"""Ages of the rats."""


RATS = _numbers("""
151 199 246 283 320  145 199 249 293 354  147 214 263 312 328  155 200 237 272 297  135 188 230 280 323
159 210 252 298 331  141 189 231 275 305  159 201 248 297 338  177 236 285 350 376  134 182 220 260 296
160 208 261 313 352  143 188 220 273 314  154 200 244 289 325  171 221 270 326 358  163 216 242 281 312
160 207 248 288 324  142 187 234 280 316  156 203 243 283 317  157 212 259 307 336  152 203 246 286 321
154 205 253 298 334  139 190 225 267 302  146 191 229 272 302  157 211 250 285 323  132 185 237 286 331
160 207 257 303 345  169 216 261 295 333  157 205 248 289 316  137 180 219 258 291  153 200 244 286 324
""").reshape(30, 5)


LSAT = _numbers("""
3 6 2 11 1 1 3 4 1 8 0 16 0 3 2 15 10 29 14 81 3 28 15 80 16 56 21 173 11 61 28 298
""").astype(int)
"""Persons with each pattern of answers, from 00000 to 11111."""


EARTHQUAKES = _numbers("""
13 14 8 10 16 26 32 27 18 32 36 24 22 23 22 18 25 21 21 14 8 11 14 23 18 17 19 20 22 19 13 26 13 14 22 24 21 22 26 21
23 24 27 41 31 27 35 26 28 36 39 21 17 22 17 19 15 34 10 15 22 18 15 20 15 22 19 16 30 27 29 23 20 16 21 21 25 16 18 15
18 14 10 15 8 15 6 11 8 7 18 16 13 12 13 20 15 16 12 18 15 16 13 15 16 11 11
""")


NILE = _numbers("""
1120 1160 963 1210 1160 1160 813 1230 1370 1140 995 935 1110 994 1020 960 1180 799 958 1140 1100 1210 1150 1250 1260
1220 1030 1100 774 840 874 694 940 833 701 916 692 1020 1050 969 831 726 456 824 702 1120 1100 832 764 821 768 845 864
862 698 845 744 796 1040 759 781 865 845 944 984 897 822 1010 771 676 649 846 812 742 801 1040 860 874 848 890 744 749
838 1050 918 986 797 923 975 815 1020 906 901 1170 912 746 919 718 714 740
""")


def answers() -> np.ndarray:
    """The answers of ``LSAT``, a row for each person, (1000, 5)."""
    return np.repeat(np.array(list(itertools.product((0.0, 1.0), repeat=5))), LSAT, axis=0)
