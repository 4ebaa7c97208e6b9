"""What runs inside the sandbox. Standard library only: nothing else of this program is visible there."""
