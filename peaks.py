from memtest import *
