from losses import *
