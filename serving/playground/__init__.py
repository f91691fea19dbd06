"""The playground: a page on which two policies answer side by side, and answers as files that show themselves. Plain
HTML, CSS and JavaScript in `assets`, without a build."""
