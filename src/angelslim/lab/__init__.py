"""Layer 8: tiny real models and the tasks on which every table can be reproduced without a download."""
